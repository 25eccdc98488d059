"""Waits of the training of a vision-language reward for a GPU, on the simulated device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genalign.reward_learning.heads import IdentityHead
from genalign.reward_learning.objective import RewardObjective
from genalign.reward_learning.preference_losses import BradleyTerryLoss
from genalign.reward_learning.regularizers import Centering
from genalign.reward_learning.training import RewardFit, RewardTraining, build_network
from rewards import vqa
from rewards.learned_encoders import YesTokenLogits
from tests.fake_cuda import FakeCuda
from tests.rewards.test_learned_encoders import data_for, samples_for
from tests.rewards.test_vqa import TEMPLATE, WORDS, save_llava

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(autouse=True)
def networks_of_the_test_alone() -> Iterator[None]:
    """No other test gets networks without values."""
    vqa.load_model.cache_clear()
    yield
    vqa.load_model.cache_clear()


def test_a_step_of_a_vision_language_reward_waits_in_transformers_alone(tmp_path: Path) -> None:
    folder = str(save_llava(tmp_path / "model", WORDS, TEMPLATE))
    questions = ["is {prompt} red"]
    data = data_for(YesTokenLogits(folder, questions), samples_for(YesTokenLogits(folder)), tmp_path, ("overall",))
    with FakeCuda() as cuda:
        encoder = YesTokenLogits(folder, questions, lora_rank=2)
        network = build_network(encoder, IdentityHead(), 1, 1, 0, "cuda")
        assert network.level.device.type == "cuda"
        object.__setattr__(data.tokens, "encoder", encoder)
        object.__setattr__(data.tokens, "device", "cuda")
        training = RewardTraining(
            network, data, RewardObjective(BradleyTerryLoss(), regularizers=[Centering()]), RewardFit()
        )
        (member,), rows = training.members, torch.arange(2)
        member.fitter.step(training.loss(member, rows))
        cuda.waits.clear()
        member.fitter.step(training.loss(member, rows))
        waits = list(cuda.waits)
    assert {wait.functions[-1] for wait in waits} <= {"_logits"}, [str(wait) for wait in waits]
