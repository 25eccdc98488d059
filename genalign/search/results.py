"""Results of searches, which print, save and tile themselves, with plain sampling and both costs beside the gain.

P prompts, M samples of a prompt, K rewards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.runtime.files import write_json
from genalign.runtime.media import Writer, displayed, medium_of, writer
from genalign.scoring.budget import DECODE, Budget, Ledger
from genalign.types import Prompt


@dataclass(frozen=True, repr=False)
class PlainSample:
    """The sample that plain sampling makes of a prompt's first noise, without a search.

    Attributes:
        sample: The decoded sample (...).
        scores: Its scores (K,).
        ledger: The calls that it took.
        extra: Whether they were made only for the comparison; False for a candidate of the search, whose cost contains
            them.
    """

    sample: Tensor
    scores: Tensor
    ledger: Ledger
    extra: bool


@dataclass(frozen=True, repr=False)
class PromptResult:
    """The best samples of one prompt.

    Attributes:
        prompt: The prompt.
        rewards: The names of the rewards.
        samples: Decoded samples (M, ...): the one that the strategy chose, then the others by their scores.
        scores: Their scores (M, K).
        plain: The plain sample; None if it was not made.
        ledger: The calls of the search.
        seconds: Wall-clock seconds of the search.
    """

    prompt: Prompt
    rewards: tuple[str, ...]
    samples: Tensor
    scores: Tensor
    plain: PlainSample | None
    ledger: Ledger
    seconds: float

    @property
    def gain(self) -> Tensor | None:
        """By how much each reward (K,) of the chosen sample exceeds that of the plain sample, if there is one."""
        return None if self.plain is None else self.scores[0] - self.plain.scores

    def __str__(self) -> str:
        scores = _scores_text(self.rewards, self.scores[0], self.gain)
        cost = f"{self.ledger.nfe} NFE, {self.ledger.counts[DECODE]} decodes, {self.seconds:.1f} s"
        if self.plain is None:
            return f"{self.prompt.text}: {scores}; {cost}"
        where = "counted apart" if self.plain.extra else "among them"
        return f"{self.prompt.text}: {scores} over plain sampling; {cost} (plain: {self.plain.ledger.nfe} NFE, {where})"

    __repr__ = __str__

    @property
    def pil(self) -> list[Any]:
        """The samples as PIL images, or waveforms (C, L) as float32 arrays of NumPy."""
        return [displayed(sample) for sample in self.samples]

    def save(self, directory: Path, index: int, write: Writer) -> dict[str, Any]:
        """Write the samples and the plain one as files, and return their row of JSON.

        Args:
            directory: The folder; the chosen sample is number ``index`` of its medium, as in images/00017.png, the
                others are in top/00017, and the plain one is in plain.
            index: The number of the prompt.
            write: Writes samples.
        """
        (best,) = write(self.samples[:1], directory, index)
        top = Path("top") / f"{index:05d}"
        others = write(self.samples[1:], directory / top, 1) if len(self.samples) > 1 else []
        row: dict[str, Any] = {
            "index": index,
            "prompt": self.prompt.text,
            "scores": self._scores(self.scores[0]),
            "image": best,
            "calls": dict(self.ledger.counts),
            "seconds": self.seconds,
            "top": [
                {"scores": self._scores(scores), "image": str(top / name)}
                for name, scores in zip(others, self.scores[1:], strict=True)
            ],
            "plain": None,
        }
        if self.plain is not None:
            (name,) = write(self.plain.sample[None], directory / "plain", index)
            row["plain"] = {
                "scores": self._scores(self.plain.scores),
                "image": f"plain/{name}",
                "calls": dict(self.plain.ledger.counts),
                "extra": self.plain.extra,
            }
        return row

    def _scores(self, values: Tensor) -> dict[str, float | None]:
        """Name the scores (K,); a failed one is null in JSON."""
        finite = [value if math.isfinite(value) else None for value in values.tolist()]
        return dict(zip(self.rewards, finite, strict=True))


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The best samples of each of P prompts; ``print`` shows rewards, gains over plain sampling and costs.

    Attributes:
        per_prompt: The result of each prompt.
        lineage: Every candidate of the search as JSON (see ``lineage.Lineage.as_list``).
        winners: The number in the lineage of each prompt's chosen candidate.
        budget: The budget of each prompt, with the prices that it was planned with.
        sample_rate: Of waveforms, in Hz.
    """

    per_prompt: tuple[PromptResult, ...]
    lineage: list[dict[str, Any]]
    winners: tuple[int, ...]
    budget: Budget | None = None
    sample_rate: int | None = None

    @property
    def samples(self) -> Tensor:
        """The chosen sample of each prompt (P, ...)."""
        return torch.stack([one.samples[0] for one in self.per_prompt])

    @property
    def scores(self) -> Tensor:
        """The scores (P, K) of the chosen samples."""
        return torch.stack([one.scores[0] for one in self.per_prompt])

    @property
    def ledger(self) -> Ledger:
        """The calls of the search; those of plain samples that were made for the comparison are not among them."""
        return _sum(one.ledger for one in self.per_prompt)

    @property
    def plain_ledger(self) -> Ledger:
        """The calls of plain samples that were made for the comparison alone."""
        return _sum(one.plain.ledger for one in self.per_prompt if one.plain and one.plain.extra)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the search, without plain samples that were made for the comparison."""
        return math.fsum(one.seconds for one in self.per_prompt)

    @property
    def unused(self) -> float:
        """The budget left over, in its unit, as a mean over prompts. Raises ValueError without a budget."""
        if self.budget is None:
            raise ValueError("there was no budget")
        return self.budget.limit - self.budget.spent(self.ledger) / len(self.per_prompt)

    def __str__(self) -> str:
        lines = [str(one) for one in self.per_prompt]
        if len(lines) > 1:
            gains = [one.gain for one in self.per_prompt if one.gain is not None]
            gain = torch.stack(gains).nanmean(0) if len(gains) == len(lines) else None
            scores = _scores_text(self.per_prompt[0].rewards, self.scores.nanmean(0), gain)
            over = " over plain sampling" if gain is not None else ""
            apart = f", and {self.plain_ledger.nfe} NFE for plain samples" if self.plain_ledger.nfe else ""
            lines.append(
                f"mean of {len(lines)} prompts: {scores}{over}; {self.ledger.nfe} NFE, {self.ledger.counts[DECODE]}"
                f" decodes, {self.seconds:.1f} s in all{apart}"
            )
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def pil(self) -> list[Any]:
        """The chosen sample of each prompt as a PIL image, or as a float32 array (C, L) of NumPy for a waveform."""
        return [displayed(sample) for sample in self.samples]

    def grid(self) -> Any:
        """Tile the images: a row for each prompt, with the plain sample, if there is one, and the best, best first.

        Raises ValueError for samples that are not images.
        """
        from diffusers.utils import make_image_grid

        if medium_of(self.samples).name != "image":
            raise ValueError("a grid is of images: save() writes sound as files, and .pil has it as arrays")
        plain = all(one.plain for one in self.per_prompt)
        columns = min(len(one.samples) for one in self.per_prompt)
        images = []
        for one in self.per_prompt:
            images += [displayed(one.plain.sample)] if plain and one.plain else []
            images += one.pil[:columns]
        return make_image_grid(images, len(self.per_prompt), columns + plain)

    def save(self, directory: str | Path, write: Writer | None = None) -> Path:
        """Write all samples with ``scores.json`` and ``lineage.json``, and return the folder.

        Args:
            directory: The folder: the best sample of prompt 17 is images/00017.png, the next ones are in top/00017, and
                its plain sample is plain/images/00017.png.
            write: Writes samples; by default PNG and WAV files.

        Raises:
            ValueError: The sample rate of sound is not known.
        """
        folder = Path(directory)
        if write is None and medium_of(self.samples).name == "audio" and self.sample_rate is None:
            raise ValueError(
                "the sample rate of these waveforms is not known: give save write=genalign.runtime.media.writer(RATE)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        save = partial(PromptResult.save, directory=folder, write=write or writer(self.sample_rate))
        write_json(folder / "lineage.json", {"chosen": list(self.winners), "lives": self.lineage})
        write_json(folder / "scores.json", [save(one, index=index) for index, one in enumerate(self.per_prompt)])
        return folder


def _scores_text(names: Sequence[str], scores: Tensor, gain: Tensor | None) -> str:
    """As in "sharp 0.1416 (+0.0312), red -0.0824 (+0.01)"."""
    texts = []
    for place, (name, score) in enumerate(zip(names, scores.tolist(), strict=True)):
        change = f" ({float(gain[place]):+.4g})" if gain is not None and math.isfinite(gain[place]) else ""
        texts.append(f"{name} {score:.4g}{change}" if math.isfinite(score) else f"{name} failed")
    return ", ".join(texts)


def _sum(ledgers: Any) -> Ledger:
    total: Counter[str] = Counter()
    for ledger in ledgers:
        total.update(ledger.counts)
    return Ledger(total)
