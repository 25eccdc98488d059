"""What a resumed run may change, and how texts are encoded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from genalign.cli.resume import InputFingerprint, require_same, train_request
from pipelines import SD3


def test_texts_are_encoded_in_the_same_batches_again(tiny: SD3) -> None:
    first, second = tiny, copy.deepcopy(tiny)
    first.encode(["a", "b", "c"])
    first.encode(["d"])
    second.encode_together(first.encoded)
    expected = first.encode(["b", "d"]).tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.encode(["b", "d"]).tensors.items())
    assert sorted(second.encoded) == sorted(first.encoded) == [["", "a", "b", "c"], ["d"]]


def test_a_resumed_run_keeps_its_settings() -> None:
    stored: dict[str, Any] = {"output": "a", "training": {"rounds": 2, "seed": 0}, "checkpoint": {"every": 1}}
    free = {"output": "b", "training": {"rounds": 9, "seed": 0}, "checkpoint": {"every": 5}}
    require_same(stored, free)
    require_same(stored, stored | {"training": {"rounds": 2, "seed": 0, "max_rounds_without_credit": 5}})
    with pytest.raises(ValueError, match=r"training\.seed was 0 and is 1: choose another output"):
        require_same(stored, stored | {"training": {"rounds": 2, "seed": 1}})
    with pytest.raises(ValueError, match=r"lora\.rank was None and is 4; training\.seed was 0 and is None"):
        require_same(stored, stored | {"training": {"rounds": 2}, "lora": {"rank": 4}})


def test_forms_of_resume(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    own = ["--config", "x"]
    assert train_request(own) == (own, False)
    assert train_request([*own, "--resume"]) == train_request(["--resume", *own]) == (own, True)
    whole = ["--config", str(tmp_path / "config.json"), "--training.rounds", "9", "--output", str(tmp_path)]
    assert train_request(["--resume", str(tmp_path), "--training.rounds", "9"]) == (whole, True)
    with pytest.raises(FileNotFoundError, match="nowhere has no run to resume"):
        train_request(["--resume=nowhere"])


@pytest.mark.parametrize("name", ["my run", "läufe", "runs.v2"])
def test_a_run_that_was_moved_is_resumed_where_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text('{"output": "where/it/was"}')
    expected = ["--config", str(tmp_path / name / "config.json"), "--output", str(tmp_path / name)]
    assert train_request(["--resume", str(tmp_path / name)]) == (expected, True)
    assert train_request(["--resume", f"{tmp_path / name}/"]) == (expected, True)


@pytest.mark.parametrize(("now", "name"), [(("other", "p"), "model"), (("m", "other"), "prompts")])
def test_a_resumed_run_has_the_inputs_that_it_began_with(now: tuple[str, str], name: str) -> None:
    state = InputFingerprint("m", "p").state()
    InputFingerprint("m", "p").restore(state)
    with pytest.raises(ValueError, match=f"{name} changed since the run began: restore it, or choose another"):
        InputFingerprint(*now).restore(state)
