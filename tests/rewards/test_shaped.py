from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.advantages import leave_one_out
from genalign.scoring.descriptions import describe
from genalign.scoring.reference_scores import ReferencedReward, ReferenceScores, RewardScores
from genalign.types import ComparesWithReferences, Prompt, Reward, SaturatingReward
from rewards.combine import Standardized, WeightedSum
from rewards.jpeg import compressibility, incompressibility
from rewards.shaped import (
    Calibrated,
    Ceiling,
    LogSigmoidCentered,
    PreferenceAsReward,
    Residualized,
    reference_levels,
    reference_scores,
)

NAN = math.nan
PROMPTS = [Prompt("a"), Prompt("a"), Prompt("b")]
SAMPLES = torch.zeros(3, 3, 2, 2)
REFERENCES = [0.5, 1.5, 2.5]


def gives(*scores: float) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    return lambda samples, prompts: torch.tensor(scores)


def scored(reward: Callable[[Tensor, Sequence[Prompt]], Tensor], prompts: Sequence[Prompt] = PROMPTS) -> list[float]:
    assert isinstance(reward, Reward)
    scores = reward(SAMPLES, prompts)
    assert scores.dtype == torch.float32
    return scores.tolist()


def near(*values: float) -> object:
    return pytest.approx(values, abs=1e-6, nan_ok=True)


A, B, C = gives(1.0, 2.0, 3.0), gives(3.0, 2.0, NAN), gives(5.0, 2.0, 1.0)
FOUR = [Prompt("a")] * 4


def test_preference_over_samples_before_training() -> None:
    scores = gives(0.0, 1.0, 2.0, 5.0)
    preferred = scored(PreferenceAsReward(scores, REFERENCES), FOUR)
    assert preferred == near(0.2119414575, 0.3941418413, 0.6058581587, 0.9612808822)
    steep = scored(PreferenceAsReward(scores, {"a": REFERENCES}, scale=3.0), FOUR)
    assert steep == near(0.0646550817, 0.3369956475, 0.6630043525, 0.9998061049)
    credit = leave_one_out(torch.tensor(preferred), torch.zeros(4, dtype=torch.long))
    assert credit.tolist() == near(-0.4418188365, -0.1988849916, 0.0834034317, 0.5573003964)
    far = torch.tensor(scored(PreferenceAsReward(gives(9.0, 10.0, 11.0, 12.0), REFERENCES), FOUR))
    faded = leave_one_out(far, torch.zeros(4, dtype=torch.long))
    assert faded.tolist() == near(-0.0006136434, 0.0000202837, 0.000253725, 0.0003396348)


def test_preference_depends_on_differences_alone() -> None:
    shifted = PreferenceAsReward(gives(7.0, 8.0, 9.0, 12.0), [reference + 7 for reference in REFERENCES])
    assert scored(shifted, FOUR) == near(0.2119414575, 0.3941418413, 0.6058581587, 0.9612808822)
    assert scored(PreferenceAsReward(A, [2.0])) == near(1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-1)))
    assert scored(PreferenceAsReward(B, [2.0]))[2:] == near(NAN)
    certain = scored(PreferenceAsReward(gives(0.0, 1.0, 2.0, 5.0), REFERENCES, scale=1e4), FOUR)
    assert certain == near(*scored(Calibrated(gives(0.0, 1.0, 2.0, 5.0), REFERENCES), FOUR))


BASE = [1.0, 2.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0]
FIVE, RAW = [Prompt("a")] * 5, (0.0, 2.0, 4.0, 8.0, 9.0)


def test_calibrated_by_samples_before_training() -> None:
    assert scored(Calibrated(gives(*RAW), BASE), FIVE) == near(0, 0.25, 0.5, 0.9375, 1)
    best = scored(Calibrated(gives(*RAW), BASE, tilt=10.0), FIVE)
    assert best == near(0.0000453999, 0.0005530844, 0.006737947, 0.5352614285, 1)
    worst = scored(Calibrated(gives(*RAW), BASE, tilt=-10.0), FIVE)
    assert worst == near(-1, -0.0820849986, -0.006737947, -0.0000848182, -0.0000453999)
    stretched = Calibrated(gives(*(math.exp(score) for score in RAW)), torch.tensor(BASE).exp().tolist())
    assert scored(stretched, FIVE) == near(0, 0.25, 0.5, 0.9375, 1)  # the same of any increasing function
    assert scored(Calibrated(B, BASE))[2:] == near(NAN)
    with pytest.raises(ValueError, match="a tilt of 0 makes all samples equal"):
        Calibrated(A, BASE, tilt=0.0)


def test_a_ceiling() -> None:
    assert scored(Ceiling(gives(0.0, 1.0, 2.0, 5.0), 2.0), FOUR) == [0, 1, 2, 2]
    assert scored(Ceiling(B, 2.5)) == near(2.5, 2, NAN)


def test_what_a_nuisance_explains_before_training_is_taken_off() -> None:
    scores, nuisances = gives(1.0, 2.0, 1.5, 3.0, 2.5), gives(0.05, 0.10, 0.06, 0.20, 0.12)
    reward = Residualized.measured(scores, nuisances, SAMPLES, FIVE)
    assert (reward.slope, reward.mean) == (pytest.approx(12.5698324022, rel=1e-6), pytest.approx(0.106))
    assert scored(reward, FIVE) == pytest.approx(
        [1.7039106145, 2.0754189944, 2.0782122905, 1.8184357542, 2.3240223464], abs=1e-5
    )
    later = Residualized(gives(5.0), gives(0.4), reward.slope, reward.mean)
    assert scored(later, FOUR[:1]) == pytest.approx([1.3044692737], abs=1e-5)
    more = gives(1.0, 2.0, 1.5, 3.0, 2.5, NAN), gives(0.05, 0.1, 0.06, 0.2, 0.12, 9.0)
    missing = Residualized.measured(*more, SAMPLES, [])
    assert missing == Residualized(missing.reward, missing.nuisance, reward.slope, reward.mean)
    assert scored(Residualized(A, B, 1.0, 0.0)) == near(-2, 0, NAN)
    with pytest.raises(ValueError, match="the nuisance is the same for all samples: it explains nothing"):
        Residualized.measured(A, gives(0.1, 0.1, 0.1), SAMPLES, PROMPTS)
    with pytest.raises(ValueError, match="a slope needs scores of at least 2 samples, got 1"):
        Residualized.measured(A, gives(0.1, NAN, NAN), SAMPLES, PROMPTS)


def test_the_sum_of_log_sigmoids_is_the_log_probability_of_all_being_good() -> None:
    first, second = LogSigmoidCentered(A, 2.0), LogSigmoidCentered(C, 1.0)
    sigmoids = torch.tensor([-1.0, 0.0, 1.0]).sigmoid() * torch.tensor([4.0, 1.0, 0.0]).sigmoid()
    assert scored(WeightedSum([first, second], [1.0, 1.0])) == near(*sigmoids.log().tolist())
    assert scored(LogSigmoidCentered(A, 2.0, scale=100.0)) == near(-100, math.log(0.5), 0)
    assert scored(LogSigmoidCentered(A, {"a": 1.0, "b": 3.0})) == near(
        -math.log(2), -math.log1p(math.exp(-1)), -0.693147
    )
    with pytest.raises(ValueError, match="the prompt 'b' has no reference level"):
        LogSigmoidCentered(A, {"a": 1.0})(SAMPLES, PROMPTS)


def test_reference_levels_of_base_samples() -> None:
    assert reference_levels(A, SAMPLES, PROMPTS) == pytest.approx({"a": 1.5 + 1.0364 * 0.5, "b": 3.0})
    normal = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    level = reference_levels(lambda samples, prompts: normal, torch.zeros(20000, 1), [Prompt("x")] * 20000)["x"]
    assert float((normal < level).float().mean()) == pytest.approx(0.85, abs=0.01)
    with pytest.raises(ValueError, match="no sample of 'b' could be scored"):
        reference_levels(B, SAMPLES, PROMPTS)


def test_gradients_pass_through() -> None:
    def total(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return samples.flatten(1).sum(1)

    leaf = SAMPLES.clone().requires_grad_(True)
    shaped = PreferenceAsReward(total, [0.0]), Ceiling(total, 1.0), LogSigmoidCentered(total, 0.0)
    WeightedSum([*shaped, Residualized(total, total, 0.25, 0.0)], [1.0] * 4)(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 0.25 + 1.0 + 0.5 + 0.75))


def test_bounded_rewards_say_so() -> None:
    relative = PreferenceAsReward(A, REFERENCES), Calibrated(A, REFERENCES)
    for reward in (*relative, LogSigmoidCentered(A, 0.0), Ceiling(A, 0.0)):
        assert isinstance(reward, SaturatingReward)
    assert not isinstance(Standardized(A, 0.0, 1.0), SaturatingReward)


def test_prompts_without_references_are_known_before_a_call() -> None:
    given = {"a": [1.0, 2.0]}
    for reward in (PreferenceAsReward(A, given), Calibrated(A, given), LogSigmoidCentered(A, {"a": 1.0})):
        assert isinstance(reward, ComparesWithReferences)
        reward.require_references(Prompt("a"))
        with pytest.raises(ValueError, match=r"the prompt 'c' .*: score base samples of it first"):
            reward.require_references(Prompt("c"))
    for reward in (PreferenceAsReward(A, [1.0]), LogSigmoidCentered(A, 0.5), Calibrated(A, "not read here.json")):
        reward.require_references(Prompt("c"))


# Files of reference scores


def stored(path: Path) -> Path:
    """A file of the scores of two prompts by ``compressibility``."""
    by_prompt = {"a": REFERENCES, "b": [-8.0]}
    scores = (RewardScores(describe(compressibility), by_prompt),)
    ReferenceScores({"model": "base-1", "fingerprint": "f"}, "two", scores).save(path)
    return path


def test_references_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(stored(tmp_path / "refs.json"))
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    raw = compressibility(images, PROMPTS)
    given = {"a": REFERENCES, "b": [-8.0]}
    for kind in (PreferenceAsReward, Calibrated):
        reward = kind(compressibility, path)
        assert isinstance(reward, ReferencedReward) and reward.reference_file == path
        assert torch.equal(reward(images, PROMPTS), kind(compressibility, given)(images, PROMPTS))
    levels = {"a": 1.5 + 1.0364 * torch.tensor(REFERENCES).std(correction=0).item(), "b": -8.0}
    centered = LogSigmoidCentered(compressibility, path)(images, PROMPTS)
    torch.testing.assert_close(centered, LogSigmoidCentered(lambda *_: raw, levels)(images, PROMPTS))
    assert LogSigmoidCentered(A, 0.0).reference_file is None and PreferenceAsReward(A, given).reference_file is None


def test_reference_scores_of_base_samples() -> None:
    assert reference_scores(A, SAMPLES, PROMPTS) == {"a": (1.0, 2.0), "b": (3.0,)}
    assert reference_scores(gives(1.0, NAN, 3.0), SAMPLES, PROMPTS) == {"a": (1.0,), "b": (3.0,)}


def test_bad_references_are_refused(tmp_path: Path) -> None:
    path = str(stored(tmp_path / "refs.json"))
    new = [Prompt("c")]

    def message(reward: Callable[[Tensor, Sequence[Prompt]], Tensor]) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            reward(torch.rand(1, 3, 16, 16), new)
        return str(caught.value)

    assert message(PreferenceAsReward(compressibility, path)) == (
        f"the prompt 'c' is not in {path}, the scores of the prompt set 'two': score base samples of it first"
    )
    assert message(Calibrated(compressibility, {"a": [1.0]})).startswith("the prompt 'c' is not in the references")
    assert message(Calibrated(incompressibility, path)) == (
        f'{path} has scores by "rewards.jpeg.compressibility", and none by "rewards.jpeg.incompressibility": write it'
        f" again with genalign reward references --config FILE --output {path}"
    )
    assert message(PreferenceAsReward(A, [])).startswith("references must hold at least one score")
    assert message(PreferenceAsReward(A, "none.json")).startswith("no reference scores in none.json: write them with")
    (tmp_path / "other.json").write_text("[1, 2]")
    assert "other.json has no reference scores: write" in message(Calibrated(A, str(tmp_path / "other.json")))
    with pytest.raises(ValueError, match="scale must be positive, not 0"):
        PreferenceAsReward(A, [1.0], scale=0.0)


def test_references_of_another_model_or_prompt_set_are_refused_by_name(tmp_path: Path) -> None:
    path = stored(tmp_path / "refs.json")
    scores = ReferenceScores.load(path)
    scores.require_base({"model": "the same elsewhere", "fingerprint": "f"}, path)
    scores.require_prompts(["a", "b"], path)
    with pytest.raises(ValueError, match='the base model base-1, and this run starts from base-2: fingerprint is "f"'):
        scores.require_base({"model": "base-2", "fingerprint": "g"}, path)
    with pytest.raises(ValueError, match="the prompt set 'two', which lacks 2 of this run's prompts, such as 'c'"):
        scores.require_prompts(["d", "a", "c"], path)
