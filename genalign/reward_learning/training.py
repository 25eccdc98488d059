"""Training of a reward network on judgments: an ensemble of heads on one encoder, resumable bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genalign.diffusion.noise import derived_seed
from genalign.metrics.intervals import Estimate
from genalign.reward_learning.encoding import ItemTokens, StoredTokens
from genalign.reward_learning.examples import Pairs, prompt_numbers
from genalign.reward_learning.fitting import FitSettings, Fitter
from genalign.reward_learning.held_out import (
    HeldOutMetrics,
    NuisanceCorrelations,
    accuracy_of_grades,
    accuracy_of_pairs,
)
from genalign.reward_learning.network import Head, HeadShape, RewardEncoder, RewardNetwork
from genalign.reward_learning.objective import RewardData, RewardObjective
from genalign.reward_learning.pair_measures import CalibrationBin, calibration_bins, expected_calibration_error
from genalign.reward_learning.preference_losses import GradeLoss, PairLoss, masked_mean
from genalign.reward_learning.regularizers import ScoredBatch, correlation
from genalign.runtime.files import load_state, save_state, with_prefix, without_prefix, write_text

_STANDARDIZED_BY, _LIVE = 4096, 256  # items whose tokens give mean and deviation: stored ones, computed ones
CHUNK = 256  # items scored at once


@dataclass(frozen=True)
class RewardFit:
    """How long and how a reward is trained.

    Args:
        epochs: Passes over the training judgments.
        batch_size: Number of pairs or grades in an optimizer step of a member.
        members: Heads of the ensemble, each with its own first weights and its own order of the judgments.
        optimizer: The optimizer.
        evaluate_every: Epochs between evaluations on the held-out judgments, after which a checkpoint is written.
        patience: Evaluations without a lower held-out loss after which training stops, with the weights of the lowest;
            null trains all epochs.
        seed: Seed of the first weights and of the batches.
    """

    epochs: int = 20
    batch_size: int = 64
    members: int = 1
    optimizer: FitSettings = field(default_factory=FitSettings)
    evaluate_every: int = 1
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = min(self.epochs, self.batch_size, self.members, self.evaluate_every)
        if least < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"epochs, batch_size, members, evaluate_every and patience must be at least 1, not {self}")


def build_network(
    encoder: RewardEncoder, shape: HeadShape, outputs: int, members: int, seed: int, device: str = "cpu"
) -> RewardNetwork:
    """Build an untrained network, whose members have different first weights that ``seed`` determines.

    Args:
        encoder: The encoder.
        shape: The head of each member.
        outputs: Number of dimensions and nuisances.
        members: Number of members.
        seed: Seed of the first weights.
        device: Torch device of the network.

    Raises:
        ValueError: Several members would share an encoder that is trained.
    """
    if members > 1 and any(weight.requires_grad for weight in encoder.parameters()):
        raise ValueError(
            f"the {members} members of an ensemble share one encoder, which must be frozen: leave out its blocks and"
            " lora_rank, or train one member"
        )
    heads = []
    for member in range(members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "head", member))
            heads.append(shape.build(encoder.width, outputs))
    return RewardNetwork(encoder, heads).to(device).eval()


@torch.no_grad()
def standardize(network: RewardNetwork, tokens: ItemTokens, count: int) -> None:
    """Measure mean and deviation of the tokens of ``count`` training items, by which heads read tokens."""
    most = _STANDARDIZED_BY if isinstance(tokens, StoredTokens) else _LIVE
    rows = torch.linspace(0, count - 1, min(count, most)).round().long()
    sums = torch.zeros(2, network.encoder.width, dtype=torch.float64)
    total = 0
    for part in torch.split(rows, CHUNK):
        values = tokens.tokens(part).flatten(0, 1).double().cpu()
        sums += torch.stack([values.sum(0), values.square().sum(0)])
        total += len(values)
    mean = sums[0] / total
    deviation = (sums[1] / total - mean.square()).clamp(min=0).sqrt()
    network.token_mean.copy_(mean)
    network.token_scale.copy_(torch.where(deviation > 1e-6, deviation, 1.0))


@dataclass(frozen=True)
class _Member:
    """A head in training, the loss of its grades if it learns from grades, and the numbers of its judgments."""

    head: Head
    grades: nn.Module | None
    fitter: Fitter
    rows: Tensor


class RewardTraining:
    """The training of a network; ``run`` makes it, and the network then has the trained weights.

    A step of each member is on its own batch. The batches, the learning rate and the weights follow from the seed and
    the number of the step, so a run that was interrupted ends as one that was not, bit for bit.

    Args:
        network: The network, on the device of the tokens.
        data: Training and held-out judgments with the tokens of their items.
        objective: What is minimized.
        fit: Epochs, batches, members and optimizer.
        subsets: The numbers of each member's training judgments; None gives each all of them.

    Raises:
        ValueError: The objective cannot learn from the data.
    """

    def __init__(
        self,
        network: RewardNetwork,
        data: RewardData,
        objective: RewardObjective,
        fit: RewardFit,
        subsets: Sequence[Tensor] | None = None,
    ) -> None:
        objective.require_fit(data.training)
        if fit.patience is not None and not data.has_held_out(objective.loss):
            raise ValueError(
                f"fit.patience needs held-out judgments of the kind {' or '.join(objective.loss.kinds)}, and there is"
                " none: hold out more prompts, or leave patience out"
            )
        self.network, self.data, self.objective, self.fit = network, data, objective, fit
        self.prompts = prompt_numbers(data.training.items)
        count = len(data.training.pairs if isinstance(objective.loss, PairLoss) else data.training.grades)
        member_rows = subsets or [torch.arange(count)] * fit.members
        self.steps = fit.epochs * max(math.ceil(len(rows) / fit.batch_size) for rows in member_rows)
        self.step, self.best, self.stale, self.stopped = 0, math.inf, 0, False
        self.best_weights: dict[str, Tensor] = {}
        self.members = [self._member(number, rows) for number, rows in enumerate(member_rows)]

    def _member(self, number: int, rows: Tensor) -> _Member:
        own, loss = f"heads.{number}.", self.objective.loss
        weights = {n: w for n, w in self.network.trained().items() if n.startswith((own, "encoder."))}
        grades = loss.prepare(self.data.training.grades.values) if isinstance(loss, GradeLoss) else None
        if grades is not None:
            grades.to(self.device)
            weights |= {f"loss.{name}": weight for name, weight in grades.named_parameters()}
        head = self.network.heads[number]
        assert isinstance(head, Head)
        return _Member(head, grades, Fitter(weights, self.fit.optimizer, self.steps), rows)

    @property
    def device(self) -> torch.device:
        """The device of the network, on which losses are computed."""
        return self.network.level.device

    def run(self, checkpoint: Path | None = None) -> Iterator[dict[str, Any]]:
        """Train, and yield the metrics of each evaluation; a checkpoint, where there is one, is continued.

        A checkpoint is written when training goes on after its metrics, so metrics which the caller stored are
        never missing; after an interruption in between they come again, and ``truncate_metrics`` removes the first.

        Metrics are "step", "epoch", "loss" (mean over steps and members since the last evaluation), "gradient_norm"
        (its mean likewise), "learning_rate" and "held_out".
        Raises ValueError for a checkpoint of other data or another encoder, and for a loss that is not finite.
        """
        if checkpoint is not None and checkpoint.is_file():
            self._load(checkpoint)
        else:
            standardize(self.network, self.data.tokens, len(self.data.training.items))
        every = self.steps // self.fit.epochs * self.fit.evaluate_every
        sums = torch.zeros(2, device=self.device)
        since = 0
        while self.step < self.steps and not self.stopped:
            for number, member in enumerate(self.members):
                loss = self.loss(member, self._batch(number, member))
                norm = member.fitter.step(loss)
                sums += torch.stack([loss.detach(), norm])
            self.step, since = self.step + 1, since + 1
            if self.step % every == 0 or self.step == self.steps:
                metrics = self._evaluate((sums / (since * len(self.members))).tolist())
                sums.zero_()
                since = 0
                if self.stopped or self.step == self.steps:
                    self._finish()
                yield metrics
                if checkpoint is not None:
                    self._save(checkpoint)

    def loss(self, member: _Member, rows: Tensor) -> Tensor:
        """Compute the loss () of a member on training judgments ``rows``, with all terms."""
        training, loss = self.data.training, self.objective.loss
        judged = training.pairs.rows[rows] if isinstance(loss, PairLoss) else training.grades.rows[rows]
        items, place = torch.unique(judged, return_inverse=True)
        tokens = self.network.standardized(self.data.tokens.tokens(items))
        outputs, place = member.head(tokens), self._moved(place)
        scores = self._explained(outputs)
        if isinstance(loss, PairLoss):
            lead = scores[place[:, 0]] - scores[place[:, 1]]
            value = self._pair_loss(loss, lead, training.pairs, rows)
        else:
            assert member.grades is not None
            values = self._moved(training.grades.values[rows])
            value = member.grades(scores[place], values, self.prompts[judged])
        pairs = place if isinstance(loss, PairLoss) else None
        batch = ScoredBatch(tokens, outputs, pairs, self._moved(self.data.tokens.nuisances[items]), member.head)
        terms = [*self.objective.regularizers, *filter(None, [self.objective.disentangle])]
        return sum((term.term(batch) for term in terms), start=value)

    def _pair_loss(self, loss: PairLoss, lead: Tensor, pairs: Pairs, rows: Tensor, plain: bool = False) -> Tensor:
        preferred, difference = pairs.preferred[rows], pairs.difference[rows]
        judged = self._moved(~preferred.isnan())
        targets = self._moved(preferred.nan_to_num(0.5)), self._moved(difference.nan_to_num())
        noise = None if plain else self.objective.noise
        values = loss.per_pair(lead, *targets) if noise is None else noise.per_pair(loss, lead, *targets)
        return masked_mean(values, judged)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _batch(self, number: int, member: _Member) -> Tensor:
        """Return the numbers of a member's judgments in this step; grades of a prompt are side by side."""
        batches = math.ceil(len(member.rows) / self.fit.batch_size)
        epoch, place = divmod(self.step, batches)
        generator = torch.Generator().manual_seed(derived_seed(self.fit.seed, "batches", number, epoch))
        if isinstance(self.objective.loss, PairLoss):
            order = torch.randperm(len(member.rows), generator=generator)
        else:
            prompts = self.prompts[self.data.training.grades.rows[member.rows]]
            ranks = torch.randperm(int(self.prompts.max()) + 1, generator=generator)
            order = torch.argsort(ranks[prompts], stable=True)
        return member.rows[order[place * self.fit.batch_size : (place + 1) * self.fit.batch_size]]

    # Held-out judgments

    @torch.no_grad()
    def scores(self, rows: Tensor) -> Tensor:
        """Score items by their numbers in the tokens, as (N, M, K + J) on the CPU."""
        parts = [self.network.outputs(self.data.tokens.tokens(part)).cpu() for part in torch.split(rows, CHUNK)]
        return torch.cat(parts)

    def _evaluate(self, means: Sequence[float]) -> dict[str, Any]:
        if not all(map(math.isfinite, means)):
            raise ValueError(
                f"the loss is not finite at step {self.step} of {self.steps}: lower fit.optimizer.learning_rate"
            )
        rate = self.members[0].fitter.settings.rate(self.step, self.steps)
        metrics: dict[str, Any] = {"step": self.step, "epoch": self.step * self.fit.epochs / self.steps}
        metrics |= dict(zip(("loss", "gradient_norm"), means, strict=True)) | {"learning_rate": rate}
        held_out = self.held_out()
        if held_out is not None:
            metrics["held_out"] = held_out.as_dict()
            self.stale = 0 if held_out.loss < self.best else self.stale + 1
            if self.fit.patience is not None:
                if not self.stale:
                    self.best_weights = {name: w.detach().cpu().clone() for name, w in self._weights().items()}
                self.stopped = self.stale >= self.fit.patience
            self.best = min(self.best, held_out.loss)
        return metrics

    @torch.no_grad()
    def held_out(self) -> HeldOutMetrics | None:
        """Measure the network on the held-out judgments; None where none is of the loss's kind.

        Raises ValueError for scores that are not finite.
        """
        held, loss = self.data.held_out, self.objective.loss
        if not self.data.has_held_out(loss):
            return None
        offset, count = len(self.data.training.items), len(held.dimensions)
        rows = torch.arange(offset, offset + len(held.items))
        outputs = self.scores(rows)
        if not bool(outputs.isfinite().all()):
            raise ValueError(
                f"scores of held-out samples are not finite at step {self.step} of {self.steps}: lower"
                " fit.optimizer.learning_rate, or leave out samples whose tokens are not finite"
            )
        scores, prompts = outputs.mean(1)[:, :count], prompt_numbers(held.items)
        calibration, bins = None, tuple[CalibrationBin, ...]()
        if isinstance(loss, PairLoss):
            first, second = held.pairs.rows.unbind(1)
            lead, preferred = (scores[first] - scores[second]).flatten(), held.pairs.preferred.flatten()
            judged = lead, preferred, prompts[first].repeat_interleave(count)
            calibration, bins = expected_calibration_error(*judged), calibration_bins(*judged)
        elif isinstance(loss, GradeLoss) and loss.gives_probability:
            logits, labels = scores[held.grades.rows].flatten(), held.grades.values.flatten()
            labeled = logits, labels, prompts[held.grades.rows].repeat_interleave(count)
            calibration = expected_calibration_error(*labeled)
        ensemble = outputs[..., :count].unbind(1) if len(self.members) > 1 else ()
        members = [self._accuracy(own, prompts) for own in ensemble]
        return HeldOutMetrics(
            self._held_out_loss(outputs, prompts),
            self._accuracy(scores, prompts),
            calibration,
            bins,
            {name: [member[name] for member in members] for name in held.dimensions} if members else {},
            self._nuisances(rows, outputs.mean(1), count),
        )

    def _held_out_loss(self, outputs: Tensor, prompts: Tensor) -> float:
        """Compute the loss of outputs (N, M, K + J) of the held-out items, whose prompts' numbers are (N,).

        It is that of the mean lead of the members on pairs, and the mean of the members' own losses on grades.
        """
        held, loss = self.data.held_out, self.objective.loss
        if isinstance(loss, PairLoss):
            first, second = held.pairs.rows.unbind(1)
            leads = self._moved(self._explained(outputs[first] - outputs[second]).mean(1))
            return float(self._pair_loss(loss, leads, held.pairs, torch.arange(len(held.pairs)), plain=True))
        own = self._explained(outputs + self.network.level.cpu())[held.grades.rows]
        values, of_prompts, losses = self._moved(held.grades.values), prompts[held.grades.rows], list[Tensor]()
        for member, scores in zip(self.members, own.unbind(1), strict=True):
            assert member.grades is not None
            losses.append(member.grades(self._moved(scores), values, of_prompts))
        return float(torch.stack(losses).mean())

    def _explained(self, outputs: Tensor) -> Tensor:
        """Return what of outputs (..., K + J) explains judgments: the scores (..., K), or the sum of all (..., 1)."""
        return outputs.sum(-1, keepdim=True) if self.objective.disentangle else outputs

    def _accuracy(self, scores: Tensor, prompts: Tensor) -> dict[str, Estimate | None]:
        """Measure the accuracy of scores (N, K) of the held-out items, whose prompts' numbers are (N,)."""
        held, loss = self.data.held_out, self.objective.loss
        if isinstance(loss, PairLoss):
            first, second = held.pairs.rows.unbind(1)
            columns = zip((scores[first] - scores[second]).unbind(1), held.pairs.preferred.unbind(1), strict=True)
            accuracies = [accuracy_of_pairs(*own, prompts[first]) for own in columns]
        else:
            graded, within = held.grades.rows, "rating" in loss.kinds
            columns = zip(scores[graded].unbind(1), held.grades.values.unbind(1), strict=True)
            accuracies = [accuracy_of_grades(*own, prompts[graded], within) for own in columns]
        return dict(zip(held.dimensions, accuracies, strict=True))

    def _nuisances(self, rows: Tensor, outputs: Tensor, count: int) -> dict[str, NuisanceCorrelations]:
        """Correlate the nuisances of items ``rows`` with their outputs (N, K + J), of which ``count`` are scores."""
        correlations = dict[str, NuisanceCorrelations]()
        for place, name in enumerate(self.objective.nuisances):
            values, own = self.data.tokens.nuisances[rows, place], outputs[:, count + place]
            correlations[name] = NuisanceCorrelations(
                float(correlation(values, outputs[:, 0])), float(correlation(values, own))
            )
        return correlations

    # The end, and checkpoints

    @torch.no_grad()
    def _finish(self) -> None:
        """Take the weights of the least held-out loss where training may stop early, and measure the levels.

        A level is measured where the loss leaves the origin of a member's scores open.
        """
        if self.best_weights:
            for name, weight in self._weights().items():
                weight.copy_(self.best_weights[name])
        if not self.objective.loss.has_origin:
            self.network.level.zero_()
            items = torch.linspace(0, len(self.data.training.items) - 1, min(len(self.data.training.items), 4096))
            self.network.level.copy_(self.scores(items.round().long()).mean(0))

    def _weights(self) -> dict[str, Tensor]:
        return {f"{n}.{name}": w for n, m in enumerate(self.members) for name, w in m.fitter.weights.items()}

    def _save(self, path: Path) -> None:
        tensors = with_prefix("best.", self.best_weights) | with_prefix("network.", self.network.buffers_of_scores())
        for number, member in enumerate(self.members):
            tensors |= with_prefix(f"member.{number}.", member.fitter.tensors())
        best = self.best if math.isfinite(self.best) else None
        state = {"step": self.step, "best": best, "stale": self.stale, "stopped": self.stopped}
        save_state(path, tensors, {**state, **self._identity()})

    def _identity(self) -> dict[str, str]:
        return {"data": self.data.digest(), "encoder": self.network.encoder.fingerprint()}

    def _load(self, path: Path) -> None:
        tensors, meta = load_state(path)
        for name, own in self._identity().items():
            if meta.get(name) != own:
                what = "judgments" if name == "data" else "weights of the frozen encoder"
                raise ValueError(f"{path} belongs to other {what}: choose another output")
        for number, member in enumerate(self.members):
            member.fitter.load_tensors(without_prefix(f"member.{number}.", tensors))
        for name, tensor in self.network.buffers_of_scores().items():
            tensor.copy_(tensors[f"network.{name}"])
        self.best_weights = without_prefix("best.", tensors)
        self.step, self.stale, self.stopped = meta["step"], meta["stale"], meta["stopped"]
        self.best = math.inf if meta["best"] is None else meta["best"]


def truncate_metrics(path: Path, step: int) -> None:
    """Remove the lines of a metrics.jsonl after ``step``, which are trained again, and one that was cut off."""
    if path.is_file():
        earlier = list[str]()
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):  # of a line that was cut off
                if json.loads(line)["step"] <= step:
                    earlier.append(f"{line}\n")
        write_text(path, "".join(earlier))
