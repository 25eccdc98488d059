"""``genalign serve`` and ``genalign reward check``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table, prompt_set, require_rate
from genalign.prompts import drawn_in_turn
from genalign.reward_learning.preferences import JudgedSample
from genalign.runtime.media import inside
from genalign.runtime.prompt_files import read_listing
from genalign.scoring import protocol
from genalign.scoring.reward_check import Expected, Probe, check
from genalign.types import AnyCallable, Prompt
from genalign.worlds.registry import world_of


@dataclass(frozen=True)
class Serve:
    """A reward behind HTTP: MODULE:CLASS, and its parameters as --args.NAME.

    Clients read ``name`` and ``version``: by default the import path, and a hash of the reward's configuration and of
    its local files (not of downloads from the Hub). ``sample_rate`` in Hz makes it a reward of waveforms. The
    environment variable ``token_variable`` holds the token that clients must send; an address that other machines can
    reach needs one.

    Args:
        reward: Import path of the reward; ``--args.NAME`` sets its parameters.
        host: Address to listen on; one that other machines can reach needs a token.
        port: Port to listen on.
        token_variable: Environment variable with the token that clients must send.
        name: Name that clients see; null takes the import path.
        version: Version that clients see; null takes a hash of the reward's configuration and local files.
        sample_rate: Sample rate in Hz of a reward of waveforms; null for images.
        device: Torch device of the samples that the reward receives.
        max_batch: Largest number of samples in one request.
        max_megabytes: Largest size of one request in MiB.
        max_pixels: Largest number of pixels of one image.
        max_requests: Number of requests that may wait; more are refused.
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
    """A test of a reward against the reward contract: MODULE:CLASS, and its parameters as --args.NAME.

    ``samples`` are rendered for a split of an embedded world, as in "shapes:val" or "tones:val", or read from a folder
    of PNG, JPEG, WAV or FLAC files with a prompts.jsonl: {"file_name": ..., "prompt": ...} and metadata. ``size`` in
    pixels resizes images.

    Args:
        reward: Import path of the reward; ``--args.NAME`` sets its parameters.
        samples: A split of an embedded world, such as shapes:val or tones:val, or a folder of PNG, JPEG, WAV or FLAC
            files with a prompts.jsonl of {"file_name": ..., "prompt": ...}.
        count: Number of samples.
        size: Side in pixels to which images are resized; null keeps their size.
        device: Torch device of the samples.
        tolerance: Largest difference between scores that should be equal.
        expected: Properties that this kind of reward must have.
    """

    reward: AnyCallable
    samples: str | None = None
    count: int = 8
    size: int | None = None
    device: str = "cpu"
    tolerance: float = 1e-5
    expected: Expected = field(default_factory=Expected)


def serve_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign serve MODULE:CLASS`` until it is interrupted."""
    settings, plain = parsing.parse(Serve, named_settings(arguments, "serve"), "serve")
    require_rate({"reward": settings.reward}, settings.sample_rate)
    try:
        from genalign.scoring import server
    except ImportError as error:
        raise parsing.ConfigurationError(f"{error}: pip install 'genalign[serve]'") from None
    token = os.environ.get(settings.token_variable) or None
    server.require_safe(settings.host, token, settings.token_variable)
    name, configured = reward_version(plain["reward"])
    info = protocol.ServerInfo(
        settings.name or name,
        settings.version or configured,
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


def reward_check_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward check MODULE:CLASS``; the exit status is 1 if a check fails."""
    settings, _ = parsing.parse(RewardCheck, named_settings(arguments, "reward check"), "reward check")
    samples, prompts, rate = load_samples(settings)
    require_rate({"reward": settings.reward}, rate)
    probe = Probe(samples.to(settings.device), prompts, settings.tolerance)
    checks = list(check(settings.reward, probe, settings.expected))
    status = {True: "passed", False: "[red]failed[/red]", None: "noted"}
    rows = [(one.name, status[one.passed], escape(one.measured), escape(one.advice)) for one in checks]
    print_table(("check", "", "measured", "what to do"), rows)
    failed = [one.name for one in checks if one.passed is False]
    print(f"failed: {', '.join(failed)}" if failed else "every check passed")
    return 1 if failed else 0


def named_settings(arguments: Sequence[str], command: str) -> list[str]:
    """Turn MODULE:CLASS, positional or after --reward, and --args.NAME into settings."""
    if not arguments:
        raise ValueError(f"name the reward: genalign {command} rewards.clip:ClipReward --args.model shapes-clip")
    words = list(arguments) if arguments[0].startswith("-") else ["--reward", *arguments]
    for place, word in enumerate(words[:-1]):
        if word == "--reward":
            words[place + 1] = words[place + 1] if "{" in words[place + 1] else words[place + 1].replace(":", ".")
    return [f"--reward.init_args.{one.removeprefix('--args.')}" if one.startswith("--args.") else one for one in words]


def reward_version(reward: Any) -> tuple[str, str]:
    """Return the import path of a configured reward, and a hash that identifies its version.

    The hash covers the configuration, the content of the files and folders in it, and genalign's version.
    """
    digests = []
    for path in _files_in(reward):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    whole = json.dumps([reward, digests, version("genalign")], sort_keys=True)
    name = reward["class_path"] if isinstance(reward, dict) else str(reward)
    return name, hashlib.sha256(whole.encode()).hexdigest()[:12]


def _files_in(setting: Any) -> list[Path]:
    """List the files in a configured value, including all files of its folders."""
    if isinstance(setting, dict | list):
        values = setting.values() if isinstance(setting, dict) else setting
        return [path for value in values for path in _files_in(value)]
    if not isinstance(setting, str) or not os.path.exists(setting):  # Path.exists raises for long texts
        return []
    path = Path(setting)
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def load_samples(settings: RewardCheck) -> tuple[Tensor, list[Prompt], int | None]:
    """Load the samples (B, ...) to check a reward on, their prompts, and the sample rate of waveforms in Hz.

    Raises ValueError if no samples are configured, or a folder's samples differ in size or sample rate.
    """
    if settings.samples is None:
        raise ValueError(
            "name the samples to score: --samples FOLDER with a prompts.jsonl, or a split of an embedded world, such as"
            " --samples shapes:val or tones:val"
        )
    world = world_of(settings.samples)
    if world is not None:
        prompts = drawn_in_turn(prompt_set(settings.samples), settings.count, seed=0)
        samples = world.render([prompt.metadata or {} for prompt in prompts], np.random.default_rng(0))
        rate = world.sample_rate
    else:
        folder = Path(settings.samples)
        listing = dict(list(read_listing(folder).items())[: settings.count])
        prompts, files = list(listing.values()), [inside(folder, name) for name in listing]
        parts = [JudgedSample(file).read_with_rate() for file in files]
        if len({(part.shape, rate) for part, rate in parts}) != 1:
            raise ValueError(f"the samples in {folder} differ in size or sample rate, or there are none")
        samples, rate = torch.stack([part for part, _ in parts]), parts[0][1]
    if settings.size and rate is None:
        side = (settings.size, settings.size)
        samples = torch.nn.functional.interpolate(samples, size=side, mode="bicubic", antialias=True).clamp(0, 1)
    return samples, prompts, rate
