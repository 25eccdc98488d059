"""Snapshots of a model for the reward-hacking report: measurements of samples from fixed prompts and noises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.metrics import audio, image
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.media import medium_of
from genalign.runtime.waveforms import warn_once
from genalign.types import FeatureFunction, Prompt, RewardFunction

STATISTICS: dict[str, Mapping[str, Callable[[Tensor], Tensor]]] = {
    "image": {"saturation": image.saturation, "high frequencies": image.high_frequency, "grid": image.grid_energy},
    "audio": {"level": audio.level, "crest": audio.crest, "high frequencies": audio.high_frequency},
}
"""Statistics (B,) of samples (B, ...) by the name of their medium; add an entry for a medium of your own."""


@dataclass(frozen=True)
class PanelSnapshot:
    """Measurements of N samples.

    Args:
        group: The prompt index (N,) of each sample.
        statistics: Statistics (N,) of the samples, by name.
        rewards: Held-out scores (N,), by name.
        features: Features (N, d) of length 1, or None.
        diagnostics: Numbers about the whole set, which are only reported.
    """

    group: Tensor
    statistics: Mapping[str, Tensor]
    rewards: Mapping[str, Tensor]
    features: Tensor | None
    diagnostics: Mapping[str, float]

    def tensors(self) -> dict[str, Tensor]:
        """Return all measurements as tensors by name."""
        diagnostics = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.diagnostics.items()}
        return (
            {"group": self.group}
            | with_prefix("statistics.", self.statistics)
            | with_prefix("rewards.", self.rewards)
            | ({} if self.features is None else {"features": self.features})
            | with_prefix("diagnostics.", diagnostics)
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PanelSnapshot:
        """Restore a snapshot from its ``tensors()``."""
        return cls(
            tensors["group"],
            without_prefix("statistics.", tensors),
            without_prefix("rewards.", tensors),
            tensors.get("features"),
            {name: float(value) for name, value in without_prefix("diagnostics.", tensors).items()},
        )

    def by_prompt(self, values: Tensor) -> list[Tensor]:
        """Split ``values`` (N, ...) by prompt."""
        return [values[self.group == number] for number in range(int(self.group.max()) + 1)]


@dataclass(frozen=True)
class PanelMeasures:
    """The measures of a snapshot, besides the statistics of the medium.

    Args:
        rewards: Held-out rewards, none of which is trained on.
        features: The feature extractor for diversity and drift.
        diagnostics: Measures of the whole set without a limit, such as a verifier's entropy.
    """

    rewards: Mapping[str, RewardFunction] = field(default_factory=dict)
    features: FeatureFunction | None = None
    diagnostics: Mapping[str, Callable[[Tensor, Sequence[Prompt]], float]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> PanelSnapshot:
        """Measure images (N, 3, H, W) in [0, 1] or waveforms (N, C, L) in [-1, 1]."""
        medium = medium_of(samples).name
        if medium not in STATISTICS:
            warn_once(
                f"reward-hacking report: no statistics are registered for the medium {medium!r}; add them to"
                " genalign.training.panel.STATISTICS"
            )
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        return PanelSnapshot(
            torch.tensor([texts.index(prompt.text) for prompt in prompts]),
            {name: measure(samples).double().cpu() for name, measure in STATISTICS.get(medium, {}).items()},
            {name: reward(samples, prompts).double().cpu() for name, reward in self.rewards.items()},
            None if self.features is None else F.normalize(self.features(samples).double().cpu(), dim=-1),
            {name: measure(samples, prompts) for name, measure in self.diagnostics.items()},
        )
