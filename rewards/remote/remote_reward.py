"""A reward that ``genalign serve`` serves in another environment or on another machine. Extra: remote (httpx)."""

from __future__ import annotations

import hashlib
import itertools
import json
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from genalign.runtime.media import medium_of
from genalign.scoring import protocol
from genalign.scoring.protocol import Outcome, SampleError, ServerInfo, prompt_json
from genalign.types import Prompt
from rewards.remote.http_client import (
    Faulty,
    HttpClient,
    Patience,
    Refused,
    RemoteError,
    Unavailable,
    require_address,
    scores_or_nan,
)


@dataclass(frozen=True)
class _Item:
    """An encoded sample, with the key under which its score is cached."""

    content: bytes
    prompt: Prompt
    key: bytes


@dataclass
class _Cache:
    """The server's info and the scores cached from earlier calls."""

    info: ServerInfo | None = None
    scores: OrderedDict[bytes, float] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class RemoteReward:
    """The scores of a reward that ``genalign serve`` serves elsewhere.

    Images travel as 8-bit PNG, waveforms at the server's sample rate as float WAV.

    Args:
        url: The address of the server, such as http://127.0.0.1:8000.
        token_variable: The environment variable that holds the server's token, if it needs one.
        batch_size: The largest number of samples in a request.
        concurrency: The largest number of requests under way at once.
        version: The version that the server must have, so all machines of a run are scored by the same one; null
            takes any.
        cache: The number of scores that are cached, the latest ones: 0 for a reward that is meant to vary.
        failures: What a sample that could not be scored gives: "nan", with a warning, or "raise" for a RemoteError.
        patience: How long to wait for the server, and how often to try again.
    """

    url: str
    token_variable: str = "GENALIGN_TOKEN"
    batch_size: int = 32
    concurrency: int = 4
    version: str | None = None
    cache: int = 4096
    failures: Literal["nan", "raise"] = "nan"
    patience: Patience = field(default_factory=Patience)
    _cache: _Cache = field(default_factory=_Cache, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_address(self.url)
        if self.batch_size < 1 or self.concurrency < 1:
            raise ValueError("batch_size and concurrency must be at least 1")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] or waveforms (B, C, L) as (B,), float32 on the CPU.

        Raises RemoteError where the server refuses what no retry would change: the token, the version, the schema, the
        kind of sample; and, at the first call, where there is none.
        """
        if len(samples) != len(prompts):
            raise ValueError(f"there must be one prompt per sample, not {len(prompts)} for {len(samples)}")
        media = medium_of(samples).name
        with HttpClient(self.url, self.token_variable, self.patience) as client:
            outcomes = self._outcomes(client, samples, media, prompts)
        return scores_or_nan(outcomes, f"{self.url} scored", strict=self.failures == "raise")

    def _outcomes(self, client: HttpClient, samples: Tensor, media: str, prompts: Sequence[Prompt]) -> list[Outcome]:
        """Return the outcome of each sample, from the cache or from the server."""
        info, scores = self._info(client), self._cache.scores
        if info.media != media:
            raise RemoteError(f"{self.url} scores {info.media}, not {media} samples of shape {tuple(samples.shape)}")
        pairs = list(zip(samples.detach().cpu(), prompts, strict=True))
        items = client.in_parallel(lambda pair: _encode(*pair, info), pairs, self.concurrency)
        outcomes: dict[int, Outcome] = {}
        missing: list[tuple[int, _Item]] = []
        for index, item in enumerate(items):
            if isinstance(item, SampleError):
                outcomes[index] = item
            elif item.key in scores:
                scores.move_to_end(item.key)
                outcomes[index] = scores[item.key]
            else:
                missing.append((index, item))
        # Send what is missing in batches, and cache its scores.
        sizes = [len(item.content) * 4 // 3 + len(json.dumps(prompt_json(item.prompt))) + 16 for _, item in missing]
        batches = protocol.batched_by_size(sizes, min(self.batch_size, info.max_batch), info.max_bytes - 1024)
        parts = [[missing[place][1] for place in batch] for batch in batches]
        results = client.in_parallel(lambda part: self._scored(client, info, part), parts, self.concurrency)
        for (index, item), outcome in zip(missing, itertools.chain.from_iterable(results), strict=True):
            outcomes[index] = outcome
            if not isinstance(outcome, SampleError):
                scores[item.key] = outcome
        while len(scores) > self.cache:
            scores.popitem(last=False)
        return [outcomes[index] for index in range(len(items))]

    def _info(self, client: HttpClient) -> ServerInfo:
        if self._cache.info is None:
            try:
                self._cache.info = protocol.unpack_info(client.send("/v1/info"))
            except protocol.WireError as error:
                raise RemoteError(f"{self.url}: {error}") from None
        info = self._cache.info
        if self.version is not None and info.version != self.version:
            served = f"{self.url} serves {info.name} {info.version}"
            raise RemoteError(f"{served}, but this reward needs version {self.version}")
        return info

    def _scored(self, client: HttpClient, info: ServerInfo, items: Sequence[_Item]) -> list[Outcome]:
        """Send one request; if the server fails on it or finds it too large, send its halves."""
        request_id = uuid.uuid4().hex  # the same for every attempt, so it is scored once
        wait = max(0.001, min(client.remaining, self.patience.timeout))
        prompts, contents = tuple(item.prompt for item in items), tuple(item.content for item in items)
        body = protocol.ScoreRequest(request_id, wait, prompts, info.media, contents).to_json()
        try:
            reply = protocol.unpack_reply(client.send("/v1/score", body), request_id, len(items))
        except protocol.WireError as error:
            raise Refused(200, f"{self.url}: {error}") from None
        except Unavailable as error:
            return [SampleError("unavailable", str(error))] * len(items)
        except (Faulty, Refused) as error:
            if isinstance(error, Refused) and error.status != 413:
                raise
            if len(items) == 1:
                return [SampleError("too_large" if isinstance(error, Refused) else "server_error", str(error))]
            half = len(items) // 2
            return self._scored(client, info, items[:half]) + self._scored(client, info, items[half:])
        if reply.version != info.version:
            versions = f"was version {info.version} and is now {reply.version}"
            raise RemoteError(f"{self.url} {versions}: their scores must not be mixed in one run")
        return list(reply.outcomes)


def _encode(sample: Tensor, prompt: Prompt, info: ServerInfo) -> _Item | SampleError:
    if not bool(sample.isfinite().all()):
        return SampleError("not_finite", "the sample has values that are not finite")
    rate = info.sample_rate
    content = protocol.encode_image(sample) if rate is None else protocol.encode_audio(sample, rate)
    text = json.dumps([info.version, prompt_json(prompt)], sort_keys=True)
    return _Item(content, prompt, hashlib.sha256(text.encode() + b"\0" + content).digest())
