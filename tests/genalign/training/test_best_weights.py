"""The best weights by held-out rewards: which score decides, what is kept, and the files of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from genalign.diffusion.policy import Lora, Policy
from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from genalign.metrics.intervals import Estimate
from genalign.runtime.distributed import ProcessGroup
from genalign.runtime.state import State
from genalign.scoring.score import NamedReward
from genalign.training.best_weights import BestRound, BestWeights, HeldOutScores, deciding_weights, sum_name
from genalign.training.run import Moment, WeightFiles
from genalign.training.run_folder import RunFolder
from pipelines import SD3
from tests.genalign.training.toy_runs import adversary, redness

WEIGHTS = "pytorch_lora_weights.safetensors"


def _scores(mean: float) -> HeldOutScores:
    return HeldOutScores({}, "val", "strict", Estimate(mean, mean - 0.1, mean + 0.1, 24))


@pytest.mark.parametrize(
    ("scores", "weights", "expected"),
    [
        (["strict", "partial", "clip"], {"partial": 1.0, "clip": 0.5, "other": 1.0}, {"partial": 1.0, "clip": 0.5}),
        (["strict", "partial"], {"partial": 0.3, "strict": 0.0}, {"partial": 1.0}),  # 0 only reports
        (["strict", "size"], {"size": -2.0}, {"size": -1.0}),
        (["strict", "partial"], {"clip": 1.0}, {"strict": 1.0}),
        (["real", "strict"], {"real": 1.0}, {"strict": 1.0}),  # a discriminator, which changes
        (["real"], {"real": 1.0}, {}),
    ],
)
def test_the_rewards_that_are_trained_on_decide_by_their_weights(
    scores: list[str], weights: dict[str, float], expected: dict[str, float]
) -> None:
    functions = {"real": adversary((3, 8, 8), 2)}
    rewards = [NamedReward(name, functions.get(name, redness), weight) for name, weight in weights.items()]
    assert deciding_weights(scores, rewards) == expected


def test_a_sum_of_scores_has_the_interval_of_the_sums() -> None:
    protocol = EvaluationProtocol("p", "0", 1.0, (1.0,), "ODE()", "float32", 1, (64, 64), 1, 1, "none")
    scores = [(0.0, 0.75), (0.5, 0.25), (0.25, 0.5), (0.25, float("nan"))]
    records = [SampleRecord(str(n), "all", 0, 0, None, {"a": a, "b": b}) for n, (a, b) in enumerate(scores)]
    evaluation = Evaluation(protocol, tuple(records))
    total = evaluation.weighted_sum({"a": 1.0, "b": 1.0})
    assert (total.mean, total.low, total.high, total.n) == (0.75, 0.75, 0.75, 3)  # their spreads cancel
    assert evaluation.weighted_sum({"a": 1.0}) == evaluation.overall["a"]
    assert sum_name({"a": 1.0, "b": 0.5, "c": -1.0}) == "a + 0.5 b - 1 c"


@pytest.fixture
def policy(tiny: SD3) -> Policy:
    return Policy(tiny.denoiser, Lora(rank=2))


def _move(policy: Policy, value: float) -> None:
    for tensor in policy.average.tensors:
        tensor.fill_(value)


def _file(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def _value(folder: Path) -> float:
    (value,) = {float(tensor.flatten()[0]) for tensor in _file(folder).values()}
    return value


def test_a_run_offers_the_best_weights_and_the_newest(policy: Policy, tiny: SD3, tmp_path: Path) -> None:
    files = WeightFiles(RunFolder(tmp_path), tiny, BestWeights(policy))
    for rounds, mean in enumerate((0.3, 0.5, 0.5, 0.4), start=1):
        _move(policy, float(rounds))
        files.see(rounds, _scores(mean))
        assert _value(tmp_path / "lora") == min(rounds, 2)  # at once, and of two that are equal the first
    files.save()
    assert _value(tmp_path / "lora") == 2 and _value(tmp_path / "lora-last") == 4
    expected = {"rounds": 2, "score": "strict", "prompts": "val", "evaluations": 4}
    for name in ("lora", "peft/adapter"):
        written = json.loads((tmp_path / name / "held_out.json").read_text())
        assert written == {**expected, "estimate": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 24}}
    assert not (tmp_path / "lora-last" / "held_out.json").exists() and not list(tmp_path.glob("**/*.part"))
    with files.best.weights():
        assert float(policy.parameters[0].detach().flatten()[0]) == 2
    line = files.describe(4)
    assert line.startswith("lora/: the weights after round 2, the best of 4 evaluations on held-out prompts (val)")
    assert "strict 0.500 (0.400 to 0.600)" in line and line.endswith("lora-last/: those after round 4")


def test_without_held_out_rewards_both_are_the_newest(policy: Policy, tiny: SD3, tmp_path: Path) -> None:
    files = WeightFiles(RunFolder(tmp_path), tiny, BestWeights(policy))
    _move(policy, 3.0)
    files.see(1, HeldOutScores({"real": Estimate(0.5, 0.4, 0.6, 24)}))  # of a discriminator alone
    files.save()
    assert _value(tmp_path / "lora") == _value(tmp_path / "lora-last") == 3
    assert RunFolder(tmp_path).best_round() is None
    assert files.describe(7) == (
        "lora/ and lora-last/: the newest weights, after round 7, as no held-out rewards (held_out.every,"
        " held_out.every_seconds) select the best"
    )


def test_the_best_weights_of_a_checkpoint_replace_those_of_a_later_round(
    policy: Policy, tiny: SD3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessGroup, "all_gather_object", lambda _, value: [json.loads(json.dumps(value))])  # as ranks
    files = WeightFiles(RunFolder(tmp_path), tiny, BestWeights(policy))
    _move(policy, 1.0)
    files.see(1, _scores(0.3))
    state = State(
        {name: tensor.clone() for name, tensor in files.best.state().tensors.items()}, files.best.state().numbers
    )
    _move(policy, 2.0)
    files.see(2, _scores(0.5))  # after which the process was killed, before the checkpoint
    resumed = WeightFiles(files.folder, tiny, BestWeights(policy))
    resumed.best.restore(state)
    resumed.restore()
    assert _value(tmp_path / "lora") == 1 and files.folder.best_round() == resumed.best.round
    before = (tmp_path / "lora" / WEIGHTS).stat().st_mtime_ns
    resumed.restore()
    assert (tmp_path / "lora" / WEIGHTS).stat().st_mtime_ns == before


def test_a_kill_leaves_whole_files_and_no_wrong_word_beside_them(
    policy: Policy, tiny: SD3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = WeightFiles(RunFolder(tmp_path), tiny, BestWeights(policy))
    _move(policy, 1.0)
    files.see(1, _scores(0.3))
    replaced, calls = os.replace, list[Any]()
    for moment in range(4):

        def killed(source: Any, target: Any, moment: int = moment) -> None:
            calls.append(target)
            if len(calls) > moment:
                raise KeyboardInterrupt
            replaced(source, target)

        calls.clear()
        _move(policy, 2.0 + moment)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", killed)
            files.see(2 + moment, _scores(0.4 + moment / 10))
        value, described = _value(tmp_path / "lora"), BestRound.read(tmp_path / "lora")
        assert described is None or described.rounds == value


def test_a_whole_network_is_written_at_the_end(tiny: SD3, tmp_path: Path) -> None:
    policy = Policy(tiny.denoiser, None)
    files = WeightFiles(RunFolder(tmp_path), tiny, BestWeights(policy))
    for rounds, mean in enumerate((0.5, 0.3), start=1):
        _move(policy, float(rounds))
        files.see(rounds, _scores(mean))
    assert not (tmp_path / "denoiser").exists()
    files.save()
    for name, value in (("denoiser", 1), ("denoiser-last", 2)):
        tensors = load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        assert all(bool((tensors[key] == value).all()) for key, _ in tiny.denoiser.named_parameters())
    assert RunFolder(tmp_path).best_round() == files.best.round and "denoiser-last/" in files.describe(2)


@pytest.mark.parametrize("seconds", [[5.0, 11.0, 12.0, 31.0, 32.0], [10.0, 19.9, 20.0]])
def test_a_time_interval_counts_seconds_of_training(seconds: Sequence[float]) -> None:
    due, before = [], 0.0
    for rounds, now in enumerate(seconds, start=1):
        last = now == seconds[-1]
        due.append(Moment(rounds, now, now - before, last).passed(10.0))
        before = now
    assert due == ([True, True, False, True, True] if len(seconds) == 5 else [True, False, True])


def test_an_empty_state_is_restored(policy: Policy) -> None:
    best = BestWeights(policy)
    best.restore(best.state())
    assert best.round is None and best.snapshot is None
    assert torch.is_tensor(policy.average.tensors[0])
