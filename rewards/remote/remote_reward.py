"""A reward that ``genalign serve`` serves in another environment or on another machine. Extra: remote (httpx)."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from genalign.scoring import protocol
from genalign.scoring.protocol import Info, ItemError
from genalign.types import Prompt
from rewards.remote.http_client import (
    Faulty,
    HttpClient,
    Patience,
    Refused,
    RemoteError,
    Unavailable,
    require_address,
    token_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Item:
    """A sample as it travels, with the key under which its score is kept."""

    content: bytes
    prompt: Prompt
    key: bytes


_Outcome = float | ItemError


@dataclass
class _Memory:
    """What is known from earlier calls."""

    info: Info | None = None
    resting_until: float = 0.0
    scores: OrderedDict[bytes, float] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class RemoteReward:
    """The scores of the server at ``url``, such as http://127.0.0.1:8000. Images travel as 8-bit PNG, waveforms at the
    server's sample rate as float WAV.

    ``token_variable`` names the environment variable that holds the server's token, if it wants one. At most
    ``concurrency`` requests of ``batch_size`` samples are under way. ``version`` refuses a server of any other, so that
    all machines of a run are scored by the same one. Scores of the last ``cache`` samples are kept: set 0 for a reward
    that is meant to vary. A sample that could not be scored is NaN and told in a warning; with ``failures`` "raise" it
    raises RemoteError.
    """

    url: str
    token_variable: str = "GENALIGN_TOKEN"
    batch_size: int = 32
    concurrency: int = 4
    version: str | None = None
    cache: int = 4096
    failures: Literal["nan", "raise"] = "nan"
    patience: Patience = field(default_factory=Patience)
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_address(self.url)
        if self.batch_size < 1 or self.concurrency < 1:
            raise ValueError("batch_size and concurrency must be at least 1")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of images (B, 3, H, W) in [0, 1] or waveforms (B, C, L).

        Raises RemoteError where the server refuses what no retry would change: the token, the version, the schema, the
        kind of sample; and, at the first call, where there is none.
        """
        if len(samples) != len(prompts):
            raise ValueError(f"there must be one prompt per sample: found {len(prompts)} for {len(samples)}")
        if samples.ndim not in (3, 4):
            raise ValueError(f"samples must be (B, 3, H, W) or (B, C, L), not {tuple(samples.shape)}")
        with HttpClient(self.url, token_of(self.token_variable), self.patience) as client:
            outcomes = self._outcomes(client, samples, prompts)
        self._report([outcome for outcome in outcomes if isinstance(outcome, ItemError)], len(samples))
        return torch.tensor([torch.nan if isinstance(outcome, ItemError) else outcome for outcome in outcomes])

    def _outcomes(self, client: HttpClient, samples: Tensor, prompts: Sequence[Prompt]) -> list[_Outcome]:
        info = self._info(client)
        if info.media != ("image" if samples.ndim == 4 else "audio"):
            raise RemoteError(f"{self.url} scores {info.media}, not a batch of shape {tuple(samples.shape)}")
        pairs = list(zip(samples.detach().cpu(), prompts, strict=True))
        items = client.in_parallel(lambda pair: _encoded(*pair, info), pairs, self.concurrency)
        outcomes: list[_Outcome | None] = [item if isinstance(item, ItemError) else self._kept(item) for item in items]
        asked = {index: item for index, item in enumerate(items) if isinstance(item, _Item) and outcomes[index] is None}
        for index, outcome in zip(asked, self._asked(client, info, list(asked.values())), strict=True):
            outcomes[index] = outcome
            if not isinstance(outcome, ItemError):
                self._keep(asked[index], outcome)
        return [outcome for outcome in outcomes if outcome is not None]

    def _info(self, client: HttpClient) -> Info:
        if self._memory.info is None:
            try:
                self._memory.info = protocol.unpack_info(client.get("/v1/info"))
            except protocol.WireError as error:
                raise RemoteError(f"{self.url}: {error}") from None
        info = self._memory.info
        if self.version is not None and info.version != self.version:
            raise RemoteError(f"{self.url} serves {info.name} {info.version}, and version {self.version} is asked for")
        return info

    def _asked(self, client: HttpClient, info: Info, items: Sequence[_Item]) -> list[_Outcome]:
        """What the server makes of ``items``, in their order."""
        if time.monotonic() < self._memory.resting_until:
            return [ItemError("unavailable", "the server did not answer a moment ago")] * len(items)
        sizes = [len(item.content) + len(json.dumps(protocol.prompt_json(item.prompt))) + 256 for item in items]
        batches = protocol.packed(sizes, min(self.batch_size, info.max_batch), info.max_bytes - 1024)
        parts = [[items[index] for index in batch] for batch in batches]
        found = client.in_parallel(lambda part: self._scored(client, info, part), parts, self.concurrency)
        if client.tripped:
            self._memory.resting_until = time.monotonic() + self.patience.longest_pause
        return [outcome for outcomes in found for outcome in outcomes]

    def _scored(self, client: HttpClient, info: Info, items: Sequence[_Item]) -> list[_Outcome]:
        """One request; where the server fails over it, or finds it too large, its halves."""
        try:
            return self._request(client, info, items)
        except Unavailable as error:
            return [ItemError("unavailable", str(error))] * len(items)
        except (Faulty, Refused) as error:
            if isinstance(error, Refused) and error.status != 413:
                raise
            if len(items) == 1:
                return [ItemError("too_large" if isinstance(error, Refused) else "server_error", str(error))]
        half = len(items) // 2
        return self._scored(client, info, items[:half]) + self._scored(client, info, items[half:])

    def _request(self, client: HttpClient, info: Info, items: Sequence[_Item]) -> list[_Outcome]:
        request_id = uuid.uuid4().hex  # the same for every attempt, so that it is scored once
        wait = max(0.001, min(client.remaining, self.patience.timeout))
        prompts, contents = tuple(item.prompt for item in items), tuple(item.content for item in items)
        kind, body = protocol.Request(request_id, wait, prompts, info.media, contents).pack()
        try:
            reply = protocol.unpack_reply(client.post("/v1/score", body, kind), request_id, len(items))
        except protocol.WireError as error:
            raise Refused(200, f"{self.url}: {error}") from None
        if reply.version != info.version:
            raise RemoteError(
                f"{self.url} was version {info.version} and is now {reply.version}: their scores must not be mixed in"
                " one run"
            )
        return [
            score if score is not None else error or ItemError("unscorable", "no score")
            for score, error in zip(reply.scores, reply.errors, strict=True)
        ]

    def _kept(self, item: _Item) -> float | None:
        if item.key not in self._memory.scores:
            return None
        self._memory.scores.move_to_end(item.key)
        return self._memory.scores[item.key]

    def _keep(self, item: _Item, score: float) -> None:
        self._memory.scores[item.key] = score
        while len(self._memory.scores) > self.cache:
            self._memory.scores.popitem(last=False)

    def _report(self, errors: Sequence[ItemError], count: int) -> None:
        if not errors:
            return
        counts = ", ".join(f"{number} {code}" for code, number in Counter(error.code for error in errors).items())
        told = f"{self.url} scored {count - len(errors)} of {count} samples ({counts}): {errors[0].message}"
        if self.failures == "raise":
            raise RemoteError(told)
        logger.warning("%s; the others are NaN", told)


def _encoded(sample: Tensor, prompt: Prompt, info: Info) -> _Item | ItemError:
    if not bool(sample.isfinite().all()):
        return ItemError("not_finite", "the sample has values that are not finite")
    rate = info.sample_rate
    content = protocol.encode_image(sample) if rate is None else protocol.encode_audio(sample, rate)
    text = json.dumps([info.version, protocol.prompt_json(prompt)], sort_keys=True)
    return _Item(content, prompt, hashlib.sha256(text.encode() + b"\0" + content).digest())
