"""The training of reward networks: what it learns, its exact resumption, its votes and its uncertainty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.reward_learning.encoding import LiveTokens, StoredTokens, TokenFolder, read_sample
from genalign.reward_learning.ensemble_vote import ensemble_votes
from genalign.reward_learning.examples import prompt_numbers, split_by_prompt
from genalign.reward_learning.fitting import FitSettings
from genalign.reward_learning.heads import LinearHead, MLPHead
from genalign.reward_learning.held_out import accuracy_of_grades, accuracy_of_pairs
from genalign.reward_learning.label_noise import EnsembleVote, FlipRobust, Smoothing, apply_votes
from genalign.reward_learning.laplace import laplace_posteriors
from genalign.reward_learning.network import RewardNetwork
from genalign.reward_learning.objective import RewardData, RewardObjective, nothing_held_out
from genalign.reward_learning.pair_measures import (
    CalibrationBin,
    UnmeasurableError,
    calibration,
    calibration_bins,
    expected_calibration_error,
)
from genalign.reward_learning.preference_losses import (
    BradleyTerryLoss,
    CumulativeLogit,
    LabelPool,
    PreferenceLoss,
    Regression,
    TiedBradleyTerryLoss,
)
from genalign.reward_learning.preferences import JudgedSample, Judgment, Kind
from genalign.reward_learning.regularizers import Centering, Disentangle, GradientPenalty, correlation
from genalign.reward_learning.training import RewardFit, RewardTraining, build_network, truncate_metrics
from genalign.reward_learning.uncertainty import LastLayerLaplace
from genalign.runtime.files import load_state, save_state
from genalign.runtime.media import AudioMedium, save_images
from genalign.types import Prompt
from tests.genalign.reward_learning.toy_rewards import PixelTokens, toy_data, write_judgments

FAST = RewardFit(epochs=20, batch_size=16, optimizer=FitSettings(learning_rate=0.05))


def trained(
    data: RewardData, objective: RewardObjective, fit: RewardFit = FAST, checkpoint: Path | None = None
) -> tuple[RewardTraining, list[dict[str, Any]]]:
    outputs = len(data.training.dimensions) + len(objective.nuisances)
    network = build_network(PixelTokens(), LinearHead(), outputs, fit.members, fit.seed)
    training = RewardTraining(network, data, objective, fit)
    return training, list(training.run(checkpoint))


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("pair", BradleyTerryLoss()),
        ("ranking", TiedBradleyTerryLoss()),
        ("rating", Regression()),
        ("rating", CumulativeLogit()),
        ("label", LabelPool()),
    ],
)
def test_every_loss_learns_what_was_judged(kind: Kind, loss: PreferenceLoss, tmp_path: Path) -> None:
    _, metrics = trained(toy_data(write_judgments(tmp_path, 120, kind)), RewardObjective(loss))
    held_out = metrics[-1]["held_out"]
    assert held_out["accuracy"]["overall"]["mean"] > 0.9
    assert held_out["loss"] < metrics[0]["held_out"]["loss"]
    assert [line["epoch"] for line in metrics] == list(range(1, 21))


@pytest.mark.parametrize("members", [1, 3])
def test_an_interrupted_run_ends_as_one_that_was_not(members: int, tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 60))
    objective = RewardObjective(BradleyTerryLoss(), Smoothing(0.1), [Centering(), GradientPenalty(0.1)])
    fit = replace(FAST, members=members, epochs=6, patience=3)
    whole, metrics = trained(data, objective, fit, tmp_path / "whole.safetensors")
    first = RewardTraining(build_network(PixelTokens(), LinearHead(), 1, members, 0), data, objective, fit)
    steps = first.run(tmp_path / "part.safetensors")
    before = [next(steps), next(steps)]
    second, rest = trained(data, objective, fit, tmp_path / "part.safetensors")
    assert before == metrics[:2] and rest == metrics[1:]  # the second came before its checkpoint, and comes again
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, second.network.state_dict()[name]), name
    if members > 1:
        one, two = (head.get_parameter("last.weight") for head in list(whole.network.heads)[:2])
        assert not torch.allclose(one, two)


def test_a_checkpoint_of_other_judgments_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    trained(toy_data(write_judgments(tmp_path, 20)), RewardObjective(BradleyTerryLoss()), FAST, checkpoint)
    with pytest.raises(ValueError, match="belongs to other judgments"):
        trained(toy_data(write_judgments(tmp_path, 20, seed=7)), RewardObjective(BradleyTerryLoss()), FAST, checkpoint)
    tensors, meta = load_state(checkpoint)
    save_state(checkpoint, tensors, {**meta, "encoder": "another"})
    with pytest.raises(ValueError, match="belongs to other weights of the frozen encoder"):
        trained(toy_data(write_judgments(tmp_path, 20)), RewardObjective(BradleyTerryLoss()), FAST, checkpoint)


def test_early_stopping_keeps_the_weights_of_the_lowest_held_out_loss(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 24, flips=0.4))
    network = build_network(PixelTokens(), MLPHead(64), 1, 1, 0)
    fit = RewardFit(epochs=60, batch_size=8, patience=4, optimizer=FitSettings(learning_rate=0.05, last=1.0))
    training = RewardTraining(network, data, RewardObjective(BradleyTerryLoss()), fit)
    losses = [line["held_out"]["loss"] for line in training.run()]
    assert len(losses) < 60 and losses.index(min(losses)) == len(losses) - 5
    held_out = training.held_out()
    assert held_out is not None and held_out.loss == pytest.approx(min(losses), abs=1e-6)


def test_dimensions_that_were_not_judged_are_left_out(tmp_path: Path) -> None:
    judgments = write_judgments(tmp_path, 80)
    other = [
        replace(judgment, scores={"overall": judgment.scores["overall"]} if number % 2 else {"blue": (1.0, 0.0)})
        for number, judgment in enumerate(judgments)
    ]
    data = toy_data(other)
    training, metrics = trained(data, RewardObjective(BradleyTerryLoss()))
    accuracy = metrics[-1]["held_out"]["accuracy"]
    assert set(accuracy) == {"overall", "blue"} and accuracy["overall"]["mean"] > 0.9
    scores, (first, second) = training.scores(held_out_rows(data)).mean(1), data.held_out.pairs.rows.unbind(1)
    wins = (scores[first] > scores[second]) == (data.held_out.pairs.preferred > 0.5)
    for column, name in enumerate(data.held_out.dimensions):
        judged = ~data.held_out.pairs.preferred[:, column].isnan()
        assert 0 < judged.sum() < len(judged) and accuracy[name]["n"] == int(judged.sum())
        assert accuracy[name]["mean"] == pytest.approx(float(wins[judged, column].double().mean()))


def held_out_rows(data: RewardData) -> Tensor:
    """The numbers of the held-out items in the tokens."""
    return torch.arange(len(data.held_out.items)) + len(data.training.items)


def test_held_out_judgments_of_another_dimension_are_none(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 12))
    other = replace(data, held_out=replace(data.held_out, dimensions=("blue",)).of_dimensions(("overall",)))
    assert data.has_held_out(BradleyTerryLoss()) and not other.has_held_out(BradleyTerryLoss())
    training, metrics = trained(other, RewardObjective(BradleyTerryLoss()), replace(FAST, epochs=1))
    assert training.held_out() is None and "held_out" not in metrics[-1]
    with pytest.raises(ValueError, match=r"fit\.patience needs held-out judgments of the kind pair or ranking"):
        trained(other, RewardObjective(BradleyTerryLoss()), replace(FAST, patience=1))


def test_the_members_of_an_ordinal_ensemble_are_judged_by_their_own_thresholds(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 40, "rating"))
    training, metrics = trained(data, RewardObjective(CumulativeLogit()), replace(FAST, epochs=3, members=2))
    level, grades, losses = training.network.level, data.held_out.grades, list[float]()
    scores = (training.scores(held_out_rows(data)) + level)[grades.rows]
    for place, member in enumerate(training.members):
        assert member.grades is not None
        own = member.grades(scores[:, place], grades.values, torch.zeros(len(grades)))
        losses.append(float(own.detach()))
    assert abs(losses[0] - losses[1]) > 1e-3
    assert metrics[-1]["held_out"]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)  # before levels are measured
    assert training.held_out().loss == pytest.approx(sum(losses) / 2, abs=1e-5)  # type: ignore[union-attr]
    means = training.scores(torch.arange(len(data.training.items))).mean(0)
    torch.testing.assert_close(means, torch.zeros(2, 1), rtol=0, atol=1e-5)  # thresholds leave the origin open
    assert level.abs().min() > 1e-3
    single, _ = trained(data, RewardObjective(Regression()), replace(FAST, epochs=1))
    assert single.network.level.eq(0).all()


def test_labels_have_a_calibration_where_the_score_is_a_logit(tmp_path: Path) -> None:
    data, fit = toy_data(write_judgments(tmp_path, 80, "label")), replace(FAST, epochs=2)
    training, metrics = trained(data, RewardObjective(LabelPool()), fit)
    grades = data.held_out.grades
    chance = training.scores(held_out_rows(data))[grades.rows, 0, 0].double().sigmoid()
    confidence, right = chance.maximum(1 - chance), (chance > 0.5) == (grades.values[:, 0] > 0.5)
    edges = torch.quantile(confidence, torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1])  # prompts have two labels
    gaps = torch.zeros(10, dtype=torch.float64)
    gaps.index_add_(0, torch.bucketize(confidence, edges), (confidence - right.double()) / len(grades))
    assert metrics[-1]["held_out"]["calibration"] == pytest.approx(float(gaps.abs().sum()), abs=1e-6)
    assert float(gaps.abs().sum()) > 0.01 and "bins" not in metrics[-1]["held_out"]
    for kind, loss in {"label": LabelPool(quality=0), "rating": Regression()}.items():
        _, metrics = trained(toy_data(write_judgments(tmp_path, 20, kind)), RewardObjective(loss), fit)  # type: ignore[arg-type]
        assert metrics[-1]["held_out"]["calibration"] is None


def test_nuisances_get_outputs_of_their_own(tmp_path: Path) -> None:
    """Red wins, and blue, the nuisance, goes with it in the training data: the reward leaves it out."""
    generator = torch.Generator().manual_seed(0)
    judgments = write_judgments(tmp_path, 200)
    data = toy_data(judgments, 0.2)
    tokens = data.tokens
    assert isinstance(tokens, StoredTokens) and isinstance(tokens.stored, Tensor)
    stored = tokens.stored.clone()
    blue = stored[..., 0] + 0.2 * torch.randn(len(stored), 1, generator=generator)
    stored[..., 2] = blue
    entangled = replace(data, tokens=StoredTokens(stored, blue[:, :1]))
    plain, _ = trained(entangled, RewardObjective(BradleyTerryLoss()))
    term = Disentangle({"blue": lambda samples, prompts: samples}, weight=2.0)
    apart, _ = trained(entangled, RewardObjective(BradleyTerryLoss(), disentangle=term))
    rows = torch.arange(len(data.training.items))

    def with_blue(training: RewardTraining) -> float:
        scores = training.scores(rows)[:, 0]
        return float(correlation(blue[rows, 0], scores[:, 0]).abs())

    assert with_blue(plain) > 0.8 and with_blue(apart) < 0.3
    held_out = apart.held_out()
    assert held_out is not None and plain.held_out().nuisances == {}  # type: ignore[union-attr]
    correlations = held_out.as_dict()["nuisances"]["blue"]
    others = torch.arange(len(rows), len(blue))
    outputs = apart.scores(others)[:, 0]
    wanted = [float(correlation(blue[others, 0], column)) for column in outputs.unbind(1)]
    assert [correlations["score"], correlations["own"]] == pytest.approx(wanted) and wanted[1] > 0.8


def test_held_out_measures_of_the_members_of_an_ensemble(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 40, flips=0.3))
    fit = replace(FAST, epochs=1, members=2, optimizer=FitSettings(learning_rate=0.005))
    training, metrics = trained(data, RewardObjective(BradleyTerryLoss()), fit)
    held, offset = data.held_out, len(data.training.items)
    scores = training.scores(torch.arange(offset, offset + len(held.items)))[..., 0]
    first, second = held.pairs.rows.unbind(1)
    right = ((scores[first] - scores[second]).sign() == (held.pairs.preferred - 0.5).sign()).double().mean(0)
    members = metrics[-1]["held_out"]["members"]["overall"]
    assert [one["mean"] for one in members] == pytest.approx(right.tolist())
    single, _ = trained(data, RewardObjective(BradleyTerryLoss()), replace(fit, members=1))
    assert "members" not in single.held_out().as_dict()  # type: ignore[union-attr]


def test_votes_find_planted_flips(tmp_path: Path) -> None:
    clean, noisy = (toy_data(write_judgments(tmp_path, 200, flips=flips), 0.0) for flips in (0.0, 0.15))
    wrong = (clean.training.pairs.preferred != noisy.training.pairs.preferred).squeeze(1)

    def build(members: int) -> RewardNetwork:
        return build_network(PixelTokens(), LinearHead(), 1, members, 0)

    settings = EnsembleVote(members=4, share=float(wrong.float().mean()))
    votes = ensemble_votes(build, noisy, RewardObjective(BradleyTerryLoss()), FAST, settings)
    pairs, changed = apply_votes(noisy.training.pairs, votes, settings)
    found = changed.squeeze(1)
    assert int((found & wrong).sum()) > 0.7 * int(wrong.sum())
    assert int((pairs.preferred.isnan()).sum()) == int(found.sum())
    assert 1 <= float(votes.voters.float().mean()) <= 3
    with pytest.raises(ValueError, match="an ensemble votes on pairs"):
        ensemble_votes(build, noisy, RewardObjective(Regression()), FAST, settings)


def test_the_laplace_deviation_is_larger_far_from_the_data(tmp_path: Path) -> None:
    training, _ = trained(toy_data(write_judgments(tmp_path, 80)), RewardObjective(BradleyTerryLoss()))
    (posterior,) = laplace_posteriors(training, LastLayerLaplace())
    near, far = posterior.deviation(torch.stack([posterior.center, posterior.center + 5]))
    assert float(near) == pytest.approx(0, abs=1e-9) and float(far) > 0.1
    ensemble, _ = trained(
        toy_data(write_judgments(tmp_path, 20)), RewardObjective(BradleyTerryLoss()), replace(FAST, members=2)
    )
    with pytest.raises(ValueError, match="is of one member"):
        laplace_posteriors(ensemble, LastLayerLaplace())


def test_a_trained_encoder_gets_a_gradient_and_no_ensemble(tmp_path: Path) -> None:
    judgments = write_judgments(tmp_path, 16)
    data = toy_data(judgments, 0.25)
    encoder = PixelTokens(trainable=True)
    items = [*data.training.items, *data.held_out.items]
    live = replace(data, tokens=LiveTokens(encoder, items, torch.empty(len(items), 0)))
    network = build_network(encoder, LinearHead(), 1, 1, 0)
    before = encoder.scale.detach().clone()
    list(RewardTraining(network, live, RewardObjective(BradleyTerryLoss()), replace(FAST, epochs=2)).run())
    assert not torch.equal(encoder.scale.detach(), before)
    assert set(network.trained()) == {"encoder.scale", "heads.0.last.weight", "heads.0.last.bias"}
    with pytest.raises(ValueError, match="share one encoder, which must be frozen"):
        build_network(encoder, LinearHead(), 1, 2, 0)


def test_images_of_several_sizes_are_read_in_batches_of_one_size(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 6), 0.0)
    items, batches = data.training.items, list[torch.Size]()
    for item in items[::3]:  # flat colors, which are the same in another size
        assert isinstance(item.sample.content, Path)
        save_images(item.sample.read()[None].repeat(1, 1, 2, 1), [item.sample.content])

    class Counted(PixelTokens):
        def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            assert len(samples) == len(prompts)
            batches.append(samples.shape)
            return super().forward(samples, prompts)

    encoder, rows = Counted(trainable=True), torch.tensor([5, 0, 3, 1, 9, 2, 7, 8])
    live = LiveTokens(encoder, items, torch.empty(len(items), 0), batch_size=3)
    tokens, wanted = live.tokens(rows), data.tokens.tokens(rows)
    torch.testing.assert_close(tokens, wanted)
    assert {batch[2] for batch in batches} == {8, 16}
    assert max(batch[0] for batch in batches) == 3 and sum(batch[0] for batch in batches) == len(rows)
    (gradient,) = torch.autograd.grad(tokens[..., 0].sum(), encoder.scale)
    torch.testing.assert_close(gradient, torch.tensor([float(wanted[..., 0].sum()), 0.0, 0.0]))
    batches.clear()
    list(
        RewardTraining(
            build_network(encoder, LinearHead(), 1, 1, 0),
            replace(data, tokens=live),
            RewardObjective(BradleyTerryLoss()),
            replace(FAST, epochs=1),
        ).run()
    )
    assert max(batch[0] for batch in batches) == 3

    class Parts(PixelTokens):
        def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return samples.flatten(2).transpose(1, 2)

    with pytest.raises(ValueError, match=r"has \d+ tokens, and others have \d+: give clips of one length"):
        replace(live, encoder=Parts()).tokens(rows)


def test_tokens_are_encoded_once_and_continued(tmp_path: Path) -> None:
    judgments = write_judgments(tmp_path, 8)
    data = toy_data(judgments, 0.0)
    items, store = data.training.items, TokenFolder(tmp_path / "tokens")
    red = {"red": lambda samples, prompts: samples[:, 0].mean((1, 2))}
    counts: list[int] = []

    class Killed(PixelTokens):
        def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            counts.append(len(samples))
            if len(counts) == 3:
                raise KeyboardInterrupt
            return super().forward(samples, prompts)

    with pytest.raises(KeyboardInterrupt):
        store.encode(Killed(), items, red, batch_size=4)
    done: list[int] = []
    tokens = store.encode(Killed(), items, red, batch_size=4, advance=done.append)
    assert done == [8, 4, 4] and counts == [4, 4, 4, 4, 4]
    assert isinstance(data.tokens, StoredTokens)
    torch.testing.assert_close(tokens.tokens(torch.arange(16)), data.tokens.tokens(torch.arange(16)))
    expected = torch.stack([item.sample.read() for item in items])[:, 0].mean((1, 2))
    torch.testing.assert_close(tokens.nuisances[:, 0], expected)
    store.encode(Killed(), items, red, batch_size=4)
    assert len(counts) == 5
    store.encode(Killed(), items[::-1], red, batch_size=4)  # other items: all anew
    assert len(counts) == 9
    other = Killed()
    other.scale.data.mul_(2)  # a checkpoint that changed on the disk: all anew
    assert len(counts) == 9 and torch.equal(
        store.encode(other, items[::-1], red, batch_size=4).tokens(torch.arange(16)),
        2 * data.tokens.tokens(torch.arange(16).flip(0)),
    )
    assert len(counts) == 13


def test_tokens_of_an_encoding_that_another_one_overwrote_are_not_taken(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 4), 0.0)
    items, store = data.training.items, TokenFolder(tmp_path / "tokens")
    store.encode(PixelTokens(), items)

    class Overwrites(PixelTokens):
        def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return torch.zeros(len(samples), 4, 3)

    def killed(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("genalign.reward_learning.encoding.write_json", killed)
        store.encode(Overwrites(), items)
    assert torch.equal(store.encode(PixelTokens(), items).tokens(torch.arange(8)), data.tokens.tokens(torch.arange(8)))


def test_held_out_scores_that_are_not_finite_are_named(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 8))
    assert isinstance(data.tokens, StoredTokens) and isinstance(data.tokens.stored, Tensor)
    data.tokens.stored[-1] = torch.nan
    with pytest.raises(ValueError, match="scores of held-out samples are not finite at step"):
        trained(data, RewardObjective(BradleyTerryLoss()))


def test_a_grade_that_no_training_item_has_is_left_out_of_the_held_out_loss() -> None:
    values, scores = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.3], [0.1], [0.2]])
    objective = CumulativeLogit().prepare(values)
    whole = objective(scores[:2], values[:2], torch.zeros(2))
    for unseen in (3.0, 5.0, 0.0):
        more = torch.tensor([[1.0], [2.0], [unseen]])
        torch.testing.assert_close(objective(scores, more, torch.zeros(3)), whole)


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    data = toy_data(write_judgments(tmp_path, 8))
    with pytest.raises(ValueError, match="Regression learns from judgments of the kind rating, and there is none"):
        trained(data, RewardObjective(Regression()))
    ratings = toy_data(write_judgments(tmp_path, 8, "rating"))
    with pytest.raises(ValueError, match="FlipRobust is of pairs, and Regression learns from grades"):
        trained(ratings, RewardObjective(Regression(), FlipRobust()))
    for term in (Centering(), GradientPenalty(between=True)):
        with pytest.raises(ValueError, match=f"{type(term).__name__} is of pairs, and Regression learns from grades"):
            trained(ratings, RewardObjective(Regression(), regularizers=[GradientPenalty(), term]))
    with pytest.raises(ValueError, match=r"fit\.patience needs held-out judgments of the kind rating"):
        trained(
            toy_data(write_judgments(tmp_path, 8, "rating"), 0.0),
            RewardObjective(Regression()),
            replace(FAST, patience=1),
        )
    two = replace(data.training, dimensions=("overall", "detail"))
    with pytest.raises(ValueError, match="Disentangle is of one dimension"):
        RewardObjective(BradleyTerryLoss(), disentangle=Disentangle({"a": len})).require_fit(two)
    burst = replace(FAST, optimizer=FitSettings(learning_rate=1e30, clip=None))
    with pytest.raises(ValueError, match="not finite at step"):
        trained(data, RewardObjective(BradleyTerryLoss()), burst)
    sound = tmp_path / "clip.wav"
    sound.write_bytes(AudioMedium(8000).encode(torch.zeros(1, 100)))
    clip = Judgment(Prompt("a"), (JudgedSample(sound),), "rating")
    item = replace(data.training.items[0], sample=clip.samples[0])
    with pytest.raises(ValueError, match=r"PixelTokens is an encoder of images, and a sample of .* is sound"):
        read_sample(item, PixelTokens())
    assert len(nothing_held_out(data.training).items) == 0


def test_accuracies_and_calibration_by_hand() -> None:
    prompt = torch.tensor([0, 0, 1, 1])
    lead, preferred = torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 0.5])
    estimate = accuracy_of_pairs(lead, preferred, prompt)
    assert (
        estimate is not None and estimate.mean == 0.5 and estimate.n == 2
    )  # 1/2 of the first, half a win in the other
    assert accuracy_of_pairs(lead[3:], preferred[3:], prompt[3:]) is None
    grades = torch.tensor([1.0, 2.0, 3.0, 3.0])
    within = accuracy_of_grades(torch.tensor([0.0, 1.0, 0.0, 5.0]), grades, prompt, within_prompts=True)
    assert within is not None and within.mean == 1.0 and within.n == 1
    across = accuracy_of_grades(torch.tensor([0.0, 1.0, 0.5, 5.0]), grades, torch.arange(4), within_prompts=True)
    assert across is not None and across.mean == pytest.approx((1 + 2 / 3 + 1 / 2 + 1) / 4)
    assert accuracy_of_grades(grades, torch.full((4,), 2.0), prompt, within_prompts=False) is None
    confident = torch.full((100,), 2.0)
    right = (torch.arange(100) < 80).float()
    expected = abs(float(torch.sigmoid(torch.tensor(2.0))) - 0.8)
    assert expected_calibration_error(confident, right, torch.arange(100)) == pytest.approx(expected, abs=1e-6)
    (one,) = calibration_bins(confident, right, torch.arange(100), bins=1)
    assert one.pairs == 100 and one.accuracy.mean == pytest.approx(0.8) and one.accuracy.n == 100
    assert one.confidence - one.accuracy.mean == pytest.approx(expected, abs=1e-6)
    by_prompt = calibration_bins(confident, right, torch.arange(100) // 50, bins=1)[0].accuracy
    assert by_prompt.mean == pytest.approx((1 + 30 / 50) / 2) and by_prompt.n == 2
    assert CalibrationBin.from_dict(json.loads(json.dumps(one.as_dict()))) == one
    lead, prompts = torch.randn(100, generator=torch.Generator().manual_seed(0)), torch.arange(100) // 3
    error = expected_calibration_error(lead, right, prompts)
    assert error == pytest.approx(calibration(lead, right, prompts).ece.mean, abs=1e-12)  # that of an evaluation
    with pytest.raises(UnmeasurableError, match="no pair could be scored"):
        calibration_bins(confident, torch.full((100,), torch.nan), torch.arange(100))
    assert prompt_numbers([]).tolist() == []


@pytest.mark.parametrize("within_prompts", [False, True])
def test_grades_are_compared_in_blocks_as_all_at_once(within_prompts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt, values = torch.randint(0, 9, (40,), generator=generator), torch.randint(1, 5, (40,), generator=generator)
    scores, grades = torch.randn(40, generator=generator), values.float().masked_fill(prompt == 3, torch.nan)
    monkeypatch.setattr("genalign.reward_learning.preference_losses._ROWS", 7)
    estimate = accuracy_of_grades(scores, grades, prompt, within_prompts)
    by_prompt = dict[int, list[float]]()
    for row in (~grades.isnan()).nonzero()[:, 0].tolist():
        others = (~grades.isnan()) & (grades != grades[row]) & ((prompt == prompt[row]) | (not within_prompts))
        right = (scores[others] < scores[row]) == (grades[others] < grades[row])
        by_prompt.setdefault(int(prompt[row]), []).append(float(right.double().mean()))
    means = [sum(known) / len(known) for own in by_prompt.values() if (known := [s for s in own if s == s])]
    assert estimate is not None and estimate.n == len(means)
    assert estimate.mean == pytest.approx(sum(means) / len(means), abs=1e-6)


@pytest.mark.parametrize(("fraction", "held_out"), [(0.0, 0), (0.1, 1), (0.5, 2), (0.9, 3)])
def test_a_prompt_at_least_is_on_each_side(tmp_path: Path, fraction: float, held_out: int) -> None:
    rest, held = split_by_prompt(write_judgments(tmp_path, 4), fraction, 0)
    assert len(held) == held_out and len(rest) == 4 - held_out


def test_metrics_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (5, 10, 15)))
    truncate_metrics(file, 10)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [5, 10]
    file.write_text(file.read_text() + '{"step": 15, "epo')  # cut off by a kill
    truncate_metrics(file, 20)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [5, 10]
