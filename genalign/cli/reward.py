"""``genalign serve`` and ``genalign reward check``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genalign.cli import config
from genalign.cli.context import CommandContext, prompt_set, require_rate
from genalign.runtime.media import AUDIO_SUFFIXES, inside, read_image, read_waveform
from genalign.runtime.prompt_files import read_listing
from genalign.scoring import protocol
from genalign.scoring.reward_check import Check, Expected, Probe, check
from genalign.types import AnyCallable, Prompt, PromptSet
from genalign.worlds.registry import World, world_of


@dataclass(frozen=True)
class Serve:
    """A reward behind HTTP: MODULE:CLASS, and its parameters as --args.NAME.

    ``name`` and ``version`` are what clients are told: by default its import path, and a hash of its configuration and
    of the local files that it names (not of what it takes from the Hub).
    ``sample_rate`` in Hz makes it a reward of waveforms. The environment variable ``token_variable`` holds the token
    that clients must send; an address that other machines reach needs one.
    """

    reward: AnyCallable
    host: str = "127.0.0.1"
    port: int = 8321
    token_variable: str = "GENALIGN_TOKEN"
    name: str | None = None
    version: str | None = None
    sample_rate: int | None = None
    device: str = "cpu"
    max_batch: int = 64
    max_megabytes: int = 64
    max_pixels: int = 4096 * 4096
    max_requests: int = 16


@dataclass(frozen=True)
class RewardCheck:
    """Whether a reward keeps to what every reward must: MODULE:CLASS, and its parameters as --args.NAME.

    ``samples`` are rendered for a split of a world, as in "shapes:val" or "tones:val", or a folder of PNG, JPEG, WAV or
    FLAC files with a prompts.jsonl: {"file_name": ..., "prompt": ...} and metadata. ``size`` in pixels resizes images.
    """

    reward: AnyCallable
    samples: str = "shapes:val"
    count: int = 8
    size: int | None = None
    device: str = "cpu"
    tolerance: float = 1e-5
    expected: Expected = field(default_factory=Expected)


def serve_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign serve MODULE:CLASS``, until it is interrupted."""
    settings, plain = config.parse(Serve, _by_name(arguments, "serve"), "serve")
    require_rate({"reward": settings.reward}, settings.sample_rate)
    try:
        from genalign.scoring import server
    except ImportError as error:
        raise config.ConfigurationError(f"{error}: pip install 'genalign[serve]'") from None
    token = os.environ.get(settings.token_variable) or None
    server.require_safe(settings.host, token, settings.token_variable)
    name, chosen = _identity(plain["reward"])
    info = protocol.ServerInfo(
        settings.name or name,
        settings.version or chosen,
        settings.max_batch,
        settings.max_megabytes * 2**20,
        settings.max_pixels,
        settings.sample_rate,
    )
    first = server.placeholder(info)
    app = server.build_app(settings.reward, info, token, settings.max_requests, settings.device, first)
    socket = server.listen(settings.host, settings.port)
    host, port = socket.getsockname()[:2]
    print(f"serving {info.name} {info.version} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # which may or may not come, depending on where uvicorn was
        server.server(app).run(sockets=[socket])
    print("stopped")
    return 0


def reward_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign reward check MODULE:CLASS``; the exit status is 1 where a check fails."""
    if not arguments or arguments[0] != "check":
        raise ValueError("say what to do with it: genalign reward check MODULE:CLASS")
    settings, _ = config.parse(RewardCheck, _by_name(arguments[1:], "reward check"), "reward check")
    samples = _samples(settings)
    require_rate({"reward": settings.reward}, samples.rate)
    probe = Probe(samples.values.to(settings.device), samples.prompts, settings.tolerance)
    checks = list(check(settings.reward, probe, settings.expected))
    _print(checks)
    failed = [found.name for found in checks if found.passed is False]
    print(f"failed: {', '.join(failed)}" if failed else "every check passed")
    return 1 if failed else 0


def _by_name(arguments: Sequence[str], command: str) -> list[str]:
    """MODULE:CLASS and --args.NAME as the settings that they stand for."""
    if not arguments:
        raise ValueError(f"name the reward: genalign {command} rewards.clip:ClipReward --args.model shapes-clip")
    first, *rest = arguments
    named = [first] if first.startswith("-") else ["--reward", first.replace(":", ".")]
    own = [f"--reward.init_args.{one.removeprefix('--args.')}" if one.startswith("--args.") else one for one in rest]
    return [*named, *own]


def _identity(reward: Any) -> tuple[str, str]:
    """The import path of a configured reward, and a hash of its configuration, of what is in the files and folders that
    it names, and of genalign's version.
    """
    name = reward["class_path"] if isinstance(reward, dict) else str(reward)
    whole = json.dumps([reward, [_digest(path) for path in _files_of(reward)], version("genalign")], sort_keys=True)
    return name, hashlib.sha256(whole.encode()).hexdigest()[:12]


def _files_of(setting: Any) -> list[Path]:
    """The files that a configured value names, those of its folders included."""
    if isinstance(setting, dict | list):
        values = setting.values() if isinstance(setting, dict) else setting
        return [path for value in values for path in _files_of(value)]
    if not isinstance(setting, str) or not os.path.exists(setting):  # Path.exists raises for long texts
        return []
    named = Path(setting)
    return [named] if named.is_file() else sorted(path for path in named.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Samples:
    """What a reward is tried on: ``values`` (B, ...), their prompts, and the ``rate`` of waveforms in Hz."""

    values: Tensor
    prompts: list[Prompt]
    rate: int | None


def _samples(settings: RewardCheck) -> _Samples:
    world = world_of(settings.samples)
    if world is not None:
        found = _rendered(world, prompt_set(settings.samples), settings.count)
    else:
        found = _files(Path(settings.samples), settings.count)
    if settings.size and found.rate is None:
        size = (settings.size, settings.size)
        resized = torch.nn.functional.interpolate(found.values, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return replace(found, values=resized)
    return found


def _rendered(world: World, source: PromptSet, count: int) -> _Samples:
    """``count`` rendered samples that show their prompts, of every task in turn."""
    tasks = list(source.by_task().values())
    longest = max(len(task) for task in tasks)
    chosen = [task[i] for i in range(longest) for task in tasks if i < len(task)][:count]
    made = world.render([prompt.metadata or {} for prompt in chosen], np.random.default_rng(0))
    return _Samples(made, chosen, world.sample_rate)


def _files(folder: Path, count: int) -> _Samples:
    """The first ``count`` that the folder lists. Raises ValueError where they differ in size or sample rate."""
    listed = dict(list(read_listing(folder).items())[:count])
    read = [_read(inside(folder, name)) for name in listed]
    if len({(sample.shape, rate) for sample, rate in read}) != 1:
        raise ValueError(f"the samples in {folder} differ in size or sample rate, or there are none: make them equal")
    samples, rates = zip(*read, strict=True)
    return _Samples(torch.stack(samples), list(listed.values()), rates[0])


def _read(path: Path) -> tuple[Tensor, int | None]:
    """A sample (...), and the rate of a recording."""
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        return read_image(path), None
    found = read_waveform(path)
    return found.waveform, found.sample_rate


def _print(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "", "measured", "what to do")
    for found in checks:
        table.add_row(found.name, *_told(found))
    Console().print(table)


def _told(found: Check) -> Iterator[str]:
    yield {True: "passed", False: "[red]failed[/red]", None: "noted"}[found.passed]
    yield from (text.replace("[", "\\[") for text in (found.measured, found.advice))
