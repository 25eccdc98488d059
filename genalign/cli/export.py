"""``genalign export``: the weights of a run, for use without genalign, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from genalign.cli import parsing
from genalign.cli.context import CommandContext
from genalign.cli.lora_formats import describe_lora, write_lora_format
from genalign.cli.model_card import base_of, method_of, write_model_card
from genalign.cli.model_settings import model_of
from genalign.diffusion.lora import adapter_file
from genalign.diffusion.own_adapter import kind_of
from genalign.diffusion.user_attention import USERS_FILE
from genalign.runtime.hub import Push
from genalign.training.best_weights import BestRound
from genalign.training.run_folder import RunFolder


@dataclass(frozen=True)
class Export:
    """An export of the weights of a run, with a model card.

    Args:
        run: Folder of the run.
        output: Folder to write.
        format: "lora" is only the adapter, for diffusers; "comfy" is for ComfyUI, at full strength; "kohya" for
            programs that read kohya's names (SD 1.5 and SDXL). "genalign" is an adapter other than a plain LoRA (a
            noise hypernetwork, or a LoRA with a hypernetwork), which only genalign can load. "merged" is the network
            with the adapter merged into its weights, "pipeline" a whole diffusers folder.
        round: Export the checkpoint after this many rounds; null exports the best weights by the held-out rewards, or
            without held-out rewards the newest.
        push: Name of a new Hub repository (owner/name) to which the export is uploaded; needs a token.
        private: Make that repository private.
    """

    run: str
    output: str
    format: Literal["lora", "comfy", "kohya", "genalign", "merged", "pipeline"] = "lora"
    round: int | None = None
    push: str | None = None
    private: bool = False


@dataclass(frozen=True)
class TrainedWeights:
    """The weights of a run in a folder: an adapter, or the whole network.

    Args:
        path: The folder.
        is_adapter: Whether they are an adapter.
        rounds: Their number of rounds if the run had not ended; else None.
        best: How they were selected, if they are the best by the held-out rewards; else None.
    """

    path: Path
    is_adapter: bool = True
    rounds: int | None = None
    best: BestRound | None = None

    @property
    def description(self) -> str:
        """The round of the weights, as the end of a printed line; empty for the end of a run."""
        if self.best:
            return f": the weights after {self.best}"
        return f", after round {self.rounds}: the run has not ended" if self.rounds else ""


def export_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign export``: write the weights of a run in the requested format, with a model card."""
    settings, _ = parsing.parse(Export, arguments, "export")
    run, output = Path(settings.run), Path(settings.output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output, or remove it")
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} has no config.json: give the output folder of a training run")
    RunFolder(run).require_format()
    weights = trained_weights(run, settings.round)
    if (weights.path / USERS_FILE).is_file():
        raise ValueError(
            f"{run} was trained with users, whose user attention other programs cannot load: use its lora/ with --lora,"
            f" and model.users {weights.path / USERS_FILE}"
        )
    push = Push(settings.push, settings.private) if settings.push is not None else None
    if push:
        push.require()
    _require_format(run, weights, settings.format)
    if settings.format in ("merged", "pipeline"):
        _write_network(context, run, weights, output, whole=settings.format == "pipeline")
    elif settings.format == "genalign":
        shutil.copytree(weights.path, output)
    elif settings.format == "lora":
        shutil.copytree(weights.path, output)
        describe_lora(output, base_of(run), method_of(run))
    else:
        write_lora_format(weights.path, output, settings.format, base_of(run), method_of(run))
    write_model_card(run, output, settings.format, weights.rounds, settings.push)
    print(f"{settings.format}: {output}{weights.description if settings.round is None else ''}")
    if push:
        print(f"pushed: {push.upload(output)}")
    return 0


def _require_format(run: Path, weights: TrainedWeights, format: str) -> None:
    """Raise ValueError for a format in which the weights of a run cannot be written."""
    if not weights.is_adapter:
        if format not in ("merged", "pipeline"):
            raise ValueError(f"{run} trained the whole network: export it with --format merged or pipeline")
        return
    kind = kind_of(adapter_file(weights.path))
    if kind is not None and format != "genalign":
        raise ValueError(
            f"{run} trained {kind}, which acts differently on each sample, so it cannot be written as a plain LoRA or"
            " merged: export it with --format genalign"
        )
    if kind is None and format == "genalign":
        raise ValueError(f"{run} trained a plain LoRA: export it with --format lora; the format genalign is for others")


def _write_network(context: CommandContext, run: Path, weights: TrainedWeights, output: Path, whole: bool) -> None:
    """Write the network of a run with its trained weights, or the ``whole`` pipeline with it."""
    model = model_of(json.loads((run / "config.json").read_text(encoding="utf-8")))
    pipeline = context.load(replace(model, text_cache=None))  # a whole pipeline has its text encoders
    if weights.is_adapter:
        pipeline.load_lora(weights.path)
    else:
        pipeline.load_denoiser(weights.path)
    pipeline.save_merged(output, whole)


def trained_weights(run: Path, rounds: int | None) -> TrainedWeights:
    """Find the weights of a run after a number of rounds; None for its best ones.

    These are the best by the held-out rewards, or without such rewards the newest, of its end or its last checkpoint.
    Raises FileNotFoundError if there are none, or none of that round.
    """
    adapter, network, best = run / "lora", run / "denoiser", RunFolder(run).best_round()
    checkpoints = {
        int(path.parent.name.removeprefix("round-")): path for path in run.glob("checkpoints/round-*[0-9]/lora")
    }
    if rounds in checkpoints:
        return TrainedWeights(checkpoints[rounds], rounds=rounds)
    if best and rounds in (None, best.rounds):
        return TrainedWeights(adapter if adapter.is_dir() else network, adapter.is_dir(), best=best)
    if rounds is not None:
        present = sorted({*checkpoints, best.rounds} if best else checkpoints)
        others = f"round {', '.join(map(str, present))}" if present else "none"
        raise FileNotFoundError(
            f"{run} has no weights after round {rounds}, but after {others}: checkpoint.every and"
            " checkpoint.keep control which are retained"
        )
    latest = max(checkpoints, default=0)
    if latest and (not adapter.is_dir() or _is_newer(checkpoints[latest], adapter)):
        return TrainedWeights(checkpoints[latest], rounds=latest)
    if adapter.is_dir():
        return TrainedWeights(adapter)
    if network.is_dir():
        return TrainedWeights(network, is_adapter=False)
    raise FileNotFoundError(f"{run} has no weights yet: wait for its first checkpoint")


def _is_newer(adapter: Path, before: Path) -> bool:
    """Whether an adapter is newer than another and has other weights, as in a resumed run that has not ended again."""
    new, old = adapter_file(adapter), adapter_file(before)
    return new.stat().st_mtime > old.stat().st_mtime and new.read_bytes() != old.read_bytes()
