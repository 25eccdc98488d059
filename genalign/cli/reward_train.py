"""``genalign reward train``: a reward, trained on judgments of samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.cli import parsing
from genalign.cli.context import CommandContext
from genalign.cli.generation_settings import require_positive
from genalign.evaluation.report.reward_training_page import write_reward_training
from genalign.metrics.intervals import Estimate
from genalign.reward_learning.annotators import side_choices
from genalign.reward_learning.encoding import ItemTokens, LiveTokens, TokenFolder, measured_nuisances
from genalign.reward_learning.ensemble_vote import ensemble_votes
from genalign.reward_learning.examples import Examples, examples, prompt_numbers, split_by_prompt
from genalign.reward_learning.heads import LinearHead
from genalign.reward_learning.item_scores import ItemReader, ItemScorer, ScoreFile
from genalign.reward_learning.judged_pairs import TRAINING_ITEMS
from genalign.reward_learning.label_noise import EnsembleVote, NoiseCorrection, PairVotes, apply_votes, changed_lines
from genalign.reward_learning.laplace import laplace_posteriors, require_laplace
from genalign.reward_learning.measures import UnmeasurableError, correlation_within_prompts
from genalign.reward_learning.network import HeadShape, RewardEncoder, RewardNetwork
from genalign.reward_learning.objective import RewardData, RewardObjective, nothing_held_out
from genalign.reward_learning.preference_formats import path_names, read_all_preferences
from genalign.reward_learning.preference_losses import BradleyTerryLoss, PairLoss, PreferenceLoss
from genalign.reward_learning.preferences import Judgment
from genalign.reward_learning.regularizers import Centering, Disentangle, Regularizer
from genalign.reward_learning.reward_file import REWARD, RewardDescription, save_reward
from genalign.reward_learning.training import RewardFit, RewardTraining, build_network, truncate_metrics
from genalign.reward_learning.uncertainty import LastLayerLaplace
from genalign.runtime.files import load_state, save_state, without_infinities, write_json, write_text
from genalign.runtime.progress import Progress
from genalign.runtime.text_files import read_json

_TOKENS = "tokens"
_SAVED_PAIRS = 8  # of the changed pairs, whose samples are copied for the report


@dataclass(frozen=True, kw_only=True)
class RewardTrain:
    """A reward trained on judgments of samples: rewards.learned.LearnedReward(path=OUTPUT).

    Run the command again to continue an interrupted run.

    Args:
        output: Folder of the reward, with its configuration, metrics and card.
        preferences: Folder or file of judgments, in genalign's own format or a published one, or a list of these.
        held_out: Folder or file of judgments for evaluation only, or a list of these; null holds out a fraction of the
            prompts.
        held_out_fraction: Fraction of the prompts that are held out without held_out, at least one; 0 holds out none.
        dimensions: Dimensions to learn; by default all.
        exclude_annotators: Annotators whose judgments are left out.
        encoder: Encoder of samples and prompts, as in rewards.learned_encoders.ClipTokens.
        head: Head on the encoder's tokens, as in genalign.reward_learning.heads.MLPHead; null takes LinearHead.
        loss: Loss of the preferences, as in genalign.reward_learning.preference_losses.TiedBradleyTerryLoss; null takes
            that of Bradley and Terry.
        label_noise: Correction of the loss for flipped labels, as in genalign.reward_learning.label_noise.FlipRobust;
            null trusts the labels.
        votes: Vote of an ensemble on the training pairs, after which the worst are changed; null changes none.
        regularizers: Terms added to the loss, as in genalign.reward_learning.regularizers.GradientPenalty; null takes
            Centering for an ensemble that learns from pairs, and none otherwise.
        disentangle: Nuisances whose influence on the preference is removed from the reward; null removes none.
        uncertainty: Laplace approximation of the last layer, for a single member; null for none.
        fit: Epochs, batches, members and optimizer.
        encode_batch: Largest number of samples that the encoder reads at once; a step on a trained encoder holds the
            activations of its whole batch, fit.batch_size pairs or grades.
        device: Torch device of the training.
    """

    output: str
    preferences: str | list[str]
    encoder: RewardEncoder
    held_out: str | list[str] | None = None
    held_out_fraction: float = 0.1
    dimensions: tuple[str, ...] = ()
    exclude_annotators: tuple[str, ...] = ()
    head: HeadShape | None = None
    loss: PreferenceLoss | None = None
    label_noise: NoiseCorrection | None = None
    votes: EnsembleVote | None = None
    regularizers: list[Regularizer] | None = None
    disentangle: Disentangle | None = None
    uncertainty: LastLayerLaplace | None = None
    fit: RewardFit = field(default_factory=RewardFit)
    encode_batch: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        require_positive(self, "encode_batch")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be at least 0 and below 1, not {self.held_out_fraction}")
        if self.fit.patience is not None and self.held_out is None and not self.held_out_fraction:
            raise ValueError("fit.patience needs held-out judgments: give held_out, or a held_out_fraction")
        if self.fit.members > 1 and self.uncertainty is not None:
            raise ValueError("an ensemble's uncertainty is its deviation: leave uncertainty out, or train one member")

    @property
    def objective(self) -> RewardObjective:
        """The loss with its correction for label noise, and the added terms."""
        loss = self.loss or BradleyTerryLoss()
        default = [Centering()] if self.fit.members > 1 and isinstance(loss, PairLoss) else []
        terms = default if self.regularizers is None else self.regularizers
        return RewardObjective(loss, self.label_noise, tuple(terms), self.disentangle)


def reward_train_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward train``: encode the samples, train, measure, save the reward and write its page."""
    settings, plain = parsing.parse(RewardTrain, arguments, "reward train")
    folder, progress, objective = Path(settings.output), Progress(), settings.objective
    require_same_configuration(folder, plain)
    training, held_out, counts = read_examples(settings, objective.loss)
    objective.require_fit(training)
    if settings.votes is not None:
        settings.votes.require_pairs(objective.loss)
    if settings.uncertainty is not None:
        require_laplace(settings.uncertainty, objective, held_out, settings.fit.members)
    names = tuple(training.dimensions)
    shape, outputs = settings.head or LinearHead(), len(names) + len(objective.nuisances)
    network = build_network(settings.encoder, shape, outputs, settings.fit.members, settings.fit.seed, settings.device)
    description = RewardDescription.of(network, shape, names, objective.nuisances, objective.centered)
    items = [*training.items, *held_out.items]
    data = RewardData(training, held_out, _tokens(settings, network.encoder, items, folder, progress))
    write_json(folder / "config.json", plain)
    listed = [{"digest": item.digest, "prompt": item.prompt.text} for item in training.items]
    write_json(folder / TRAINING_ITEMS, listed)
    write_json(folder / "data.json", counts)

    if settings.votes is not None:
        with progress.phase("voting on the training pairs"):
            data, votes = _voted(settings, settings.votes, shape, outputs, data, folder)
        write_json(folder / "data.json", counts | {"votes": votes})
    run = RewardTraining(network, data, objective, settings.fit)
    checkpoint, metrics_file = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
    done = load_state(checkpoint)[1]["step"] if checkpoint.is_file() else 0
    truncate_metrics(metrics_file, done)
    if done:
        print(f"continuing at step {done} of {run.steps}")
    for metrics in run.run(checkpoint):
        with metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_infinities(metrics)) + "\n")
        print(_line(metrics, run.steps), flush=True)

    with progress.phase("measuring"):
        posteriors = [] if settings.uncertainty is None else laplace_posteriors(run, settings.uncertainty)
        save_reward(folder / REWARD, network, description, posteriors)
        reader = ItemReader(sample_rate=network.encoder.sample_rate)
        scorer = ItemScorer(reader, ScoreFile(None), settings.encode_batch, progress)
        statistics = scorer.statistics(held_out.items)
        card = _card(settings, description, run, [posterior.precision for posterior in posteriors], statistics)
        write_text(folder / "card.md", card)
    print(f"report: {write_reward_training(folder)}")
    print(f"reward: {folder / REWARD}")
    return 0


def require_same_configuration(folder: Path, plain: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder has a training with other settings, apart from the device and the path."""
    if not (folder / "config.json").is_file():
        if folder.is_dir() and any(entry.name != _TOKENS for entry in folder.iterdir()):
            raise ValueError(f"{folder} is not empty, but has no training of a reward: choose another output")
        return
    before, now = read_json(folder / "config.json"), json.loads(json.dumps(plain))
    changed = sorted(name for name in {*before, *now} - {"device", "output"} if before.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"{folder} has a training with another {', '.join(changed)}: choose another output, or continue it with the"
            f" configuration {folder / 'config.json'}"
        )


@dataclass(frozen=True)
class JudgmentCounts:
    """The numbers of judgments that were read and that are used, by kind, by annotator ("" if unnamed), and of prompts.

    ``left_out`` counts the others by reason.
    """

    read: int
    left_out: Mapping[str, int]
    kinds: Mapping[str, int]
    annotators: Mapping[str, int]
    prompts: int

    def __str__(self) -> str:
        rest = "".join(f", {count} {why} left out" for why, count in self.left_out.items())
        return f"{sum(self.kinds.values())} of {self.read} judgments of {self.prompts} prompts{rest}"


def read_examples(settings: RewardTrain, loss: PreferenceLoss) -> tuple[Examples, Examples, dict[str, Any]]:
    """Read the training and held-out judgments that a loss learns from, and print and return their numbers.

    Raises ValueError if there are none, ratings are mixed with labels, or no held-out judgment is of a dimension that
    is learned.
    """
    judgments = read_all_preferences(settings.preferences)
    held_out = None if settings.held_out is None else read_all_preferences(settings.held_out)
    if held_out is None:
        judgments, held_out = split_by_prompt(judgments, settings.held_out_fraction, settings.fit.seed)
    annotators = {judgment.annotator for judgment in [*judgments, *held_out]}
    if unknown := sorted(set(settings.exclude_annotators) - annotators):
        source = path_names(settings.preferences)
        raise ValueError(f"exclude_annotators names {unknown[0]!r}, who has no judgments in {source}")
    learned, counts = _usable(judgments, "training", settings, loss)
    if not learned:
        raise ValueError(_why_nothing_is_left(judgments, settings, loss))
    training = examples(learned, settings.dimensions)
    measured, held_out_counts = _usable(held_out, "held-out", settings, loss)
    held = examples(measured).of_dimensions(training.dimensions) if measured else nothing_held_out(training)
    judged = held.pairs.preferred if isinstance(loss, PairLoss) else held.grades.values
    if measured and bool(judged.isnan().all()):
        others = ", ".join(dict.fromkeys(name for judgment in measured for name in judgment.scores))
        raise ValueError(
            f"the reward learns {', '.join(training.dimensions)}, but held-out judgments are only of {others}: give"
            " held_out judgments of it, or hold out more prompts with held_out_fraction"
        )
    seen = {item.digest for item in training.items} & {item.digest for item in held.items}
    if seen and settings.held_out is not None:
        raise ValueError(
            f"{len(seen)} samples of {path_names(settings.held_out)} are also training samples, by the hash of their"
            " files: give others"
        )
    if seen:
        print(f"{len(seen)} held-out samples are also training samples, with another prompt")
    counted = {"training": (counts, training), "held_out": (held_out_counts, held)}
    return training, held, {name: asdict(own) | {"samples": len(part.items)} for name, (own, part) in counted.items()}


def _why_nothing_is_left(judgments: Sequence[Judgment], settings: RewardTrain, loss: PreferenceLoss) -> str:
    scored, kinds = {name for judgment in judgments for name in judgment.scores}, {one.kind for one in judgments}
    if not scored:
        source = path_names(settings.preferences)
        return f"the judgments in {source} have no scores: make them with genalign reward label"
    if settings.dimensions and not scored & set(settings.dimensions):
        return f"no judgment has the dimension {settings.dimensions[0]!r}: there are {', '.join(sorted(scored))}"
    return (
        f"{type(loss).__name__} learns from judgments of kind {' or '.join(loss.kinds)}, of which none is left; the"
        f" training judgments are of kind {', '.join(sorted(kinds)) or 'none'}: use another loss, or exclude fewer"
        " annotators"
    )


def _usable(
    judgments: Sequence[Judgment], what: str, settings: RewardTrain, loss: PreferenceLoss
) -> tuple[list[Judgment], JudgmentCounts]:
    """Select judgments of the loss's kinds and dimensions by annotators who are not excluded, and print the counts.

    Raises ValueError for ratings beside labels, and for an annotator who nearly always chose the same side.
    """
    kinds = {judgment.kind for judgment in judgments}
    if {"rating", "label"} <= kinds:
        raise ValueError("the judgments mix ratings (on a scale) with labels (0 or 1): train a reward on each")
    skipped = dict.fromkeys(("of another kind", "without a score", "of excluded annotators"), 0)
    usable = []
    for judgment in judgments:
        if judgment.annotator in settings.exclude_annotators:
            skipped["of excluded annotators"] += 1
        elif judgment.kind not in loss.kinds:
            skipped["of another kind"] += 1
        elif not any(name in judgment.scores for name in settings.dimensions or judgment.scores):
            skipped["without a score"] += 1
        else:
            usable.append(judgment)
    if one_sided := [choices for choices in side_choices(usable) if choices.one_sided]:
        raise ValueError(str(one_sided[0]))
    counts = JudgmentCounts(
        len(judgments),
        {why: count for why, count in skipped.items() if count},
        dict(Counter(judgment.kind for judgment in usable)),
        dict(Counter(judgment.annotator or "" for judgment in usable)),
        len({judgment.prompt.text for judgment in usable}),
    )
    print(f"{what}: {counts}")
    return usable, counts


def _tokens(
    settings: RewardTrain, encoder: RewardEncoder, items: Sequence[Any], folder: Path, progress: Progress
) -> ItemTokens:
    """Encode the items if the encoder is frozen, and otherwise only measure the nuisances of ``disentangle``."""
    nuisances = {} if settings.disentangle is None else settings.disentangle.nuisances
    if any(weight.requires_grad for weight in encoder.parameters()):
        measured = measured_nuisances(items, encoder, nuisances)
        return LiveTokens(encoder, items, measured, settings.device, settings.encode_batch)
    with progress.phase("encoding", len(items)) as advance:
        store = TokenFolder(folder / _TOKENS)
        return store.encode(encoder, items, nuisances, settings.encode_batch, settings.device, advance)


def _voted(
    settings: RewardTrain, votes: EnsembleVote, shape: HeadShape, outputs: int, data: RewardData, folder: Path
) -> tuple[RewardData, dict[str, int]]:
    """Let an ensemble vote, once, and change the training pairs that it votes against most; list them in a file.

    Also returns the numbers of labels that were voted on and that were changed.
    """
    file, training = folder / "votes.safetensors", data.training

    def build(members: int) -> RewardNetwork:
        return build_network(settings.encoder, shape, outputs, members, settings.fit.seed, settings.device)

    if file.is_file():
        tensors, meta = load_state(file)
        if meta["data"] != data.digest():
            raise ValueError(f"{file} belongs to other judgments: choose another output")
        counted = PairVotes(tensors["mean"], tensors["deviation"], tensors["voters"])
    else:
        counted = ensemble_votes(build, data, settings.objective, settings.fit, votes)
        tensors = {"mean": counted.mean, "deviation": counted.deviation, "voters": counted.voters}
        save_state(file, tensors, {"data": data.digest()})
    pairs, changed = apply_votes(training.pairs, counted, votes)
    lines = changed_lines(training.pairs, counted, changed, training.items, training.dimensions)
    samples = {item.digest: item.sample for item in training.items}
    for line in sorted(lines, key=lambda line: float(line["mean"]))[:_SAVED_PAIRS]:
        paths = [samples[digest].copy_to(folder / "changed_pairs", digest[:16]) for digest in line["digests"]]
        line["files"] = [path.relative_to(folder).as_posix() for path in paths]
    write_text(folder / "changed_pairs.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    counts = {"labels": int((~counted.mean.isnan()).sum()), "changed": len(lines)}
    print(f"votes: {votes.change} {counts['changed']} of {counts['labels']} labels: changed_pairs.jsonl")
    return replace(data, training=replace(training, pairs=pairs)), counts


def _line(metrics: Mapping[str, Any], steps: int) -> str:
    text = f"step {metrics['step']}/{steps}: loss {metrics['loss']:.4f}"
    if held_out := metrics.get("held_out"):
        text += f", held-out {held_out['loss']:.4f}"
        for name, accuracy in held_out["accuracy"].items():
            text += "" if accuracy is None else f", {name} {Estimate.from_dict(accuracy).text('.3f')}"
    return text


def _card(
    settings: RewardTrain,
    description: RewardDescription,
    run: RewardTraining,
    precisions: Sequence[float],
    statistics: Mapping[str, Tensor],
) -> str:
    """Describe a trained reward: data, measures on held-out judgments, and how to use it.

    Args:
        settings: The settings of the training.
        description: The description of its network.
        run: The finished training.
        precisions: The prior precisions of the posteriors of the dimensions, if any.
        statistics: Statistics (n,) of the held-out samples, by their names.
    """
    data, objective = run.data, run.objective
    grades = not isinstance(objective.loss, PairLoss)
    judged = data.training.grades if grades else data.training.pairs
    held = data.held_out.grades if grades else data.held_out.pairs
    kind = "grades" if grades else "pairs"
    annotators = len({name for name in judged.annotators if name})
    lines = [
        f"# A reward learned from {path_names(settings.preferences)}",
        "",
        "```python",
        "from rewards.learned import LearnedReward",
        "",
        f'reward = LearnedReward("{settings.output}")',
        "```",
        "",
        "## Training",
        "",
        f"- Encoder: {description.encoder} with {json.dumps(dict(description.encoder_arguments))}",
        f"- Head: {description.head}, {description.members} member{'s' if description.members > 1 else ''}",
        f"- Loss: {type(objective.loss).__name__}"
        + "".join(
            f", {type(term).__name__}" for term in [objective.noise, *objective.regularizers] if term is not None
        ),
        f"- Judgments: {len(judged)} {kind} of {len(data.training.items)} samples",
        f"- Annotators: {annotators or 'not named'}",
        f"- Held out: {len(held)} {kind} of {len(data.held_out.items)} samples",
        f"- Samples: training_items.json; data {data.digest()[:16]}; {run.step} optimizer steps",
        "",
        "## On held-out judgments",
        "",
    ]
    lines += _held_out_lines(run)
    if precisions:
        lines += ["", f"Prior precision of the last layer: {', '.join(f'{value:.3g}' for value in precisions)}."]
    return "\n".join([*lines, *_nuisance_lines(run, statistics)]) + "\n"


def _held_out_lines(run: RewardTraining) -> list[str]:
    """The lines of a card on held-out judgments."""
    measured = run.held_out()
    if measured is None:
        return ["Nothing was held out."]
    lines = ["| dimension | accuracy (95 % interval) |", "|---|---|"]
    accuracies = measured.accuracy.items()
    lines += [f"| {name} | {'-' if own is None else own.text('.3f')} |" for name, own in accuracies]
    lines += ["", f"Loss {measured.loss:.4f}."]
    if measured.calibration is not None:
        logit = "difference" if isinstance(run.objective.loss, PairLoss) else "score"
        lines += [f"Expected calibration error of sigmoid({logit}): {measured.calibration:.3f}."]
    return lines


def _nuisance_lines(run: RewardTraining, statistics: Mapping[str, Tensor]) -> list[str]:
    """The card's table of correlations between the scores of held-out samples and their statistics, within prompts."""
    held_out, offset = run.data.held_out, len(run.data.training.items)
    if not held_out.items:
        return []
    rows, prompts = torch.arange(offset, offset + len(held_out.items)), prompt_numbers(held_out.items)
    scores = run.scores(rows).mean(1)[:, : len(held_out.dimensions)]
    apart = zip(run.objective.nuisances, run.data.tokens.nuisances[rows].unbind(1), strict=True)
    cells = dict[str, list[str]]()
    for name, values in (dict(statistics) | dict(apart)).items():
        for column in scores.unbind(1):
            try:
                cell = correlation_within_prompts(column, values, prompts).text("+.3f")
            except UnmeasurableError:
                cell = "-"
            cells.setdefault(name, []).append(cell)
    lines = ["", "## Nuisances", ""]
    if all(cell == "-" for row in cells.values() for cell in row):
        return [*lines, "Not measured: no prompt has held-out samples that differ in a nuisance and in their scores."]
    lines += ["Correlations with the score on held-out samples, within prompts (95 % interval).", ""]
    lines += [f"| nuisance | {' | '.join(held_out.dimensions)} |", "|---" * (1 + len(held_out.dimensions)) + "|"]
    return lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
