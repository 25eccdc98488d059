"""Deterministic algorithms during a round, and what they need on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genalign.algorithms import recipes
from genalign.runtime.determinism import deterministic, require_workspace
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.training.toy_runs import SETTINGS, redness, toy_trainer


def test_a_gpu_needs_its_workspace_set_before_the_start() -> None:
    with pytest.raises(ValueError, match="set it to :4096:8"):
        require_workspace(torch.device("cuda:0"), {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
    require_workspace(torch.device("cuda:0"), {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    require_workspace(torch.device("cpu"), {})


def test_the_former_choice_is_restored() -> None:
    with deterministic(True):
        with deterministic(False):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_rounds_and_nothing_between_them_are_deterministic(tiny: SD3, enabled: bool) -> None:
    found: list[bool] = []

    def reward(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        found.append(torch.are_deterministic_algorithms_enabled())
        return redness(samples, prompts)

    settings = replace(SETTINGS, rounds=1, deterministic=enabled)
    for _ in toy_trainer(tiny, recipes.flow_grpo(window=1), reward, settings).rounds():
        assert not torch.are_deterministic_algorithms_enabled()
    assert set(found) == {enabled}
