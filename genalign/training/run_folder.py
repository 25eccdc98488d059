"""The folder of a run: configuration, environment, metrics and weights."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from genalign.diffusion.lora import adapter_file, save_peft, student_metadata
from genalign.diffusion.policy import Policy
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.runtime.files import disk_errors, write_json, write_text
from genalign.training.best_weights import HELD_OUT_FILE, BestRound, BestWeights

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)
RUN_FORMAT = 2
"""The format of a run's folder: 2 since genalign 0.2.0; folders of genalign 0.1.0 name none in environment.json."""
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "genalign")
_PEFT_README = """\
The adapter of `../lora` in PEFT's format, for `PeftModel.from_pretrained(network, "peft/adapter")`.
diffusers' `load_lora_weights` would load nothing from it, without an error: use `lora/` for it.
"""


@runtime_checkable
class WeightStore(Protocol):
    """A pipeline that can write the trained adapter, or the whole network, in its family's own format."""

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None: ...

    def save_denoiser(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None: ...


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: its configuration, environment, metrics and weights. The main rank writes it."""

    path: Path
    processes: ProcessGroup = SINGLE_PROCESS

    def require_unused(self) -> None:
        """Raise FileExistsError if the path holds a run, or is a file."""
        if (self.path / "metrics.jsonl").exists():
            raise FileExistsError(
                f"{self.path} holds a run already: resume it (genalign train --resume {self.path}), choose another"
                " output, or remove it"
            )
        if self.path.is_file():
            raise FileExistsError(f"{self.path} is a file: output must be a folder")

    def require_format(self) -> None:
        """Raise ValueError for a run of genalign 0.1.0, whose settings, records and import paths have other names."""
        path = self.path / "environment.json"
        environment = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "genalign" in environment and "run_format" not in environment:
            raise ValueError(
                f"{self.path} was made by genalign {environment['genalign']}, whose runs this version cannot read: use"
                " the version that made it, or start a new run"
            )

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write config.json and environment.json. Raises FileExistsError for a used folder."""
        self.require_unused()
        if self.processes.is_main:
            write_json(self.path / "config.json", config)
            started = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
            write_json(self.path / "environment.json", environment(self.processes.world_size) | {"started": started})

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return config

    def record_rounds(self, rounds: int) -> None:
        """Write into config.json the number of rounds that fits the time budget of the run."""
        config = self.config()
        write_json(self.path / "config.json", config | {"training": config["training"] | {"rounds": rounds}})

    def resume(self, config: Mapping[str, Any], rounds: int) -> None:
        """Return to the state after ``rounds`` rounds, continuing with ``config``, and warn if the machine differs.

        Raises ValueError if metrics.jsonl has fewer rounds.
        """
        if not self.processes.is_main:
            return
        before = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        now = environment(self.processes.world_size)
        changes = [f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]]
        if changes:
            logger.warning("The results may differ from those of an uninterrupted run: %s", ", ".join(changes))
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if len(lines) < rounds:
            raise ValueError(
                f"{path} has {len(lines)} rounds, but the checkpoint was written after {rounds}: restore the file"
            )
        write_text(path, "".join(lines[:rounds]))
        write_json(self.path / "config.json", config)

    def finish(self) -> None:
        """Record the time at which the run ended, its evaluations included."""
        if self.processes.is_main:
            path = self.path / "environment.json"
            facts = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, facts | {"finished": datetime.now(UTC).isoformat(timespec="seconds")})

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it to the disk."""
        if not self.processes.is_main:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, policy: Policy, pipeline: WeightStore, last: bool = False) -> None:
        """Write the averaged weights: lora/ (diffusers) and peft/, or, if the whole network was trained, denoiser/.

        An adapter that is not a plain LoRA is written only into lora/, in genalign's own format. Under FSDP every rank
        must call this.

        Args:
            policy: The weights.
            pipeline: The pipeline, which writes them.
            last: Write lora-last/ or denoiser-last/ instead, beside the selected weights.
        """
        with policy.averaged():
            self._save(policy, pipeline, "-last" if last else "")

    def save_best(self, best: BestWeights, pipeline: WeightStore) -> None:
        """Write the best weights by the held-out rewards as ``save`` does, with held_out.json beside them."""
        with best.weights():
            self._save(best.policy, pipeline, "", best.round)

    def _save(self, policy: Policy, pipeline: WeightStore, suffix: str, best: BestRound | None = None) -> None:
        """Write the current weights of the network, and how they were selected, if they were."""
        whole = policy.network_state() if policy.config is None else None
        state = {} if policy.config is None else policy.adapter_state()
        if not self.processes.is_main:
            return
        with disk_errors():
            if policy.config is None:
                self._replace(f"denoiser{suffix}", lambda folder: pipeline.save_denoiser(folder, whole), best)
                return
            config = policy.config
            self._replace(f"lora{suffix}", lambda folder: pipeline.save_lora(folder, state, config), best)
            if not suffix and policy.is_plain_lora:
                student = student_metadata(adapter_file(self.path / "lora"))
                self._replace("peft/adapter", lambda folder: save_peft(folder, state, config, student), best)
                write_text(self.path / "peft" / "README.md", _PEFT_README)

    def _replace(self, name: str, write: Callable[[Path], None], best: BestRound | None) -> None:
        """Write a folder of weights under a temporary name, and then replace each file atomically.

        held_out.json is removed first and written last, so it never lies beside other weights.
        """
        folder = self.path / name
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process
        write(part)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HELD_OUT_FILE).unlink(missing_ok=True)
        for file in part.iterdir():
            os.replace(file, folder / file.name)
        part.rmdir()
        if best is not None:
            best.write(folder)

    def best_round(self) -> BestRound | None:
        """Read how the weights in lora/ or denoiser/ were selected; None if they were not."""
        return BestRound.read(self.path / "lora") or BestRound.read(self.path / "denoiser")

    def update_best_round(self, best: BestRound) -> None:
        """Update held_out.json beside the weights after further evaluations."""
        for name in ("lora", "peft/adapter", "denoiser"):
            if self.processes.is_main and (self.path / name / HELD_OUT_FILE).is_file():
                best.write(self.path / name)


def adapter_writer(policy: Policy, pipeline: WeightStore) -> Callable[[Path], None] | None:
    """Gather the averaged adapter, and return a function that writes it into a folder, in diffusers' format.

    None if the whole network is trained. Under FSDP every rank must call this.
    """
    config = policy.config
    if config is None:
        return None
    with policy.averaged():
        state = {name: tensor.detach().clone() for name, tensor in policy.adapter_state().items()}

    def write(directory: Path) -> None:
        with disk_errors():
            pipeline.save_lora(directory, state, config)

    return write


def environment(world_size: int) -> dict[str, Any]:
    """Return the versions and sizes that a result may depend on, without anything that identifies the machine."""
    return {
        "run_format": RUN_FORMAT,
        "processes": world_size,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    } | {name: version(name) for name in _LIBRARIES}
