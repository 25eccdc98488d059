"""The messages between a reward server and its clients: JSON, with samples as PNG or WAV in base64. No pickle.

``POST /v1/score`` carries the schema, request_id, deadline_ms, media ("image" or "audio"), prompts, and one sample per
prompt: 8-bit RGB PNG, or float32 or 16-bit WAV. The reply has one score or null per sample: JSON has no NaN, and no
number stands for a failure.

A change that an older side would misread takes a new ``SCHEMA``; either side refuses a schema that is not its own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

from genalign.runtime.media import eight_bits
from genalign.types import Prompt

SCHEMA = 2
MAX_DEADLINE = 3600.0  # seconds

Media = Literal["image", "audio"]


class WireError(Exception):
    """A message that breaks the protocol, or a sample that cannot be read; ``code`` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ServerInfo:
    """What a server scores, and its limits for one request. ``sample_rate`` in Hz is None if it scores images."""

    name: str
    version: str
    max_batch: int
    max_bytes: int
    max_pixels: int
    sample_rate: int | None = None
    schema: int = SCHEMA

    @property
    def media(self) -> Media:
        """The medium of the samples that it scores."""
        return "image" if self.sample_rate is None else "audio"

    def to_json(self) -> bytes:
        """Return the body of the answer to ``GET /v1/info``."""
        return _dumped(asdict(self))


@dataclass(frozen=True)
class SampleError:
    """The reason why one sample has no score; ``code`` is for programs, ``message`` for people."""

    code: str
    message: str


@dataclass(frozen=True)
class ScoreRequest:
    """Encoded ``samples``, one per prompt. ``deadline`` is the number of seconds that the client will wait."""

    request_id: str
    deadline: float
    prompts: tuple[Prompt, ...]
    media: Media
    samples: tuple[bytes, ...]

    def to_json(self) -> bytes:
        """Return the body of ``POST /v1/score``. Raises ValueError for metadata that JSON cannot hold."""
        return _dumped(
            {
                "schema": SCHEMA,
                "request_id": self.request_id,
                "deadline_ms": max(1, round(self.deadline * 1000)),
                "media": self.media,
                "prompts": [prompt_json(prompt) for prompt in self.prompts],
                "samples": [base64.b64encode(sample).decode() for sample in self.samples],
            }
        )

    def digest(self) -> bytes:
        """Return a hash of the prompts and samples."""
        digest = hashlib.sha256(json.dumps([prompt_json(prompt) for prompt in self.prompts]).encode())
        for sample in self.samples:
            digest.update(hashlib.sha256(sample).digest())
        return digest.digest()


Outcome = float | SampleError
"""The score of a sample, or the reason why it has none."""


@dataclass(frozen=True)
class ScoreReply:
    """The outcome of each sample, by a reward of this ``version``; ``seconds`` is the time spent on the server."""

    request_id: str
    version: str
    outcomes: tuple[Outcome, ...]
    seconds: float

    def to_json(self) -> bytes:
        """Return the body of the answer to ``POST /v1/score``."""
        rows = [(None, asdict(row)) if isinstance(row, SampleError) else (row, None) for row in self.outcomes]
        scores, errors = zip(*rows, strict=True)
        head = {"schema": SCHEMA, "request_id": self.request_id, "version": self.version}
        return _dumped({**head, "scores": scores, "errors": errors, "seconds": self.seconds})


def prompt_json(prompt: Prompt) -> dict[str, Any]:
    """Convert a prompt to JSON values. Raises ValueError for metadata that JSON cannot hold."""
    plain = {"text": prompt.text, "metadata": None if prompt.metadata is None else dict(prompt.metadata)}
    try:
        _dumped(plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of prompt {prompt.text!r} cannot travel as JSON: {error}") from None
    return plain


def unpack_info(body: bytes) -> ServerInfo:
    """Read the answer to ``GET /v1/info``. Raises WireError for another schema, or another service's answer."""
    fields = _object(body)
    try:
        info = ServerInfo(**{name: value for name, value in fields.items() if name in ServerInfo.__dataclass_fields__})
        counts = (info.max_batch, info.max_bytes, info.max_pixels)
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise TypeError("its limits are not positive integers")
    except TypeError as error:
        raise WireError("malformed", f"this is not a genalign reward server: {error}") from None
    return info


def unpack_request(body: bytes) -> ScoreRequest:
    """Read the body of ``POST /v1/score``. Raises WireError."""
    fields = _object(body)
    if unknown := set(fields) - {"schema", "request_id", "deadline_ms", "media", "prompts", "samples"}:
        raise WireError("unknown_field", f"the request has unknown fields: {', '.join(sorted(unknown))}")
    request_id, deadline, media = fields.get("request_id"), fields.get("deadline_ms"), fields.get("media")
    if not isinstance(request_id, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", request_id):
        raise WireError("malformed", "request_id must be 1 to 64 letters, digits, - or _")
    if type(deadline) is not int or deadline <= 0:
        raise WireError("malformed", "deadline_ms must be a positive integer")
    if media not in ("image", "audio"):
        raise WireError("media_type", 'media must be "image" or "audio"')
    prompts, samples = fields.get("prompts"), fields.get("samples")
    if not isinstance(prompts, list) or not prompts or not isinstance(samples, list):
        raise WireError("malformed", "prompts and samples must be lists with one entry per sample")
    if len(prompts) != len(samples):
        raise WireError("count", f"{len(prompts)} prompts need as many samples, not {len(samples)}")
    try:
        contents = tuple(base64.b64decode(sample, validate=True) for sample in samples)
    except (TypeError, ValueError):
        raise WireError("malformed", "each sample must be base64 text") from None
    deadline = min(deadline / 1000, MAX_DEADLINE)
    return ScoreRequest(request_id, deadline, tuple(map(_prompt, prompts)), media, contents)


def unpack_reply(body: bytes, request_id: str, count: int) -> ScoreReply:
    """Read the reply to a request of ``count`` samples. Raises WireError for anything else."""
    fields = _object(body)
    scores, errors = fields.get("scores"), fields.get("errors")
    if not isinstance(scores, list) or not isinstance(errors, list) or not len(scores) == len(errors) == count:
        raise WireError("malformed", f"the reply does not hold {count} scores and errors")
    if fields.get("request_id") != request_id:
        raise WireError("malformed", "the reply belongs to another request")
    outcomes: list[Outcome] = []
    try:
        for score, error in zip(scores, errors, strict=True):
            if score is None:
                error = error or {"code": "unscorable", "message": "no score"}
                outcomes.append(SampleError(str(error["code"]), str(error["message"])))
            elif isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
                outcomes.append(float(score))
            else:
                raise ValueError(f"{score!r} is not a score")
        return ScoreReply(request_id, str(fields["version"]), tuple(outcomes), float(fields["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WireError("malformed", f"the reply cannot be read: {type(error).__name__}: {error}") from None


def encode_image(image: Tensor) -> bytes:
    """Encode an image (3, H, W) in [0, 1] as PNG, rounded to 8 bits and otherwise lossless."""
    buffer = io.BytesIO()
    Image.fromarray(eight_bits(image).permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(content: bytes, max_pixels: int) -> Tensor:
    """Decode an 8-bit RGB PNG to (3, H, W) in [0, 1]. Raises WireError; the size is checked before decoding."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as file:
            if file.width * file.height > max_pixels:
                raise WireError("too_large", f"{file.width} x {file.height} is more than {max_pixels} pixels")
            if file.mode != "RGB":
                raise WireError("undecodable", f"a PNG of mode {file.mode}: send 8-bit RGB")
            pixels = np.array(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise WireError("undecodable", "this is not a PNG image") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def encode_audio(waveform: Tensor, sample_rate: int) -> bytes:
    """Encode a waveform (C, L) at ``sample_rate`` Hz as 32-bit float WAV, lossless."""
    buffer = io.BytesIO()
    wavfile.write(buffer, sample_rate, waveform.detach().float().cpu().numpy().T)
    return buffer.getvalue()


def decode_audio(content: bytes, sample_rate: int) -> Tensor:
    """Decode a float32 or 16-bit WAV to (C, L). Raises WireError, also for a rate other than ``sample_rate`` Hz."""
    try:
        rate, data = wavfile.read(io.BytesIO(content))
    except Exception as error:  # the reader of untrusted bytes raises many kinds
        raise WireError("undecodable", f"this is not a WAV file ({type(error).__name__})") from None
    if rate != sample_rate:
        raise WireError("sample_rate", f"a waveform of {rate} Hz: this server scores {sample_rate} Hz")
    if data.dtype not in (np.float32, np.int16) or not data.size:
        raise WireError("undecodable", f"a WAV of {data.size} samples of {data.dtype}: send float32 or 16 bits")
    scaled = data.astype(np.float32) / (32768 if data.dtype == np.int16 else 1)
    return torch.from_numpy(np.atleast_2d(scaled.T).copy())


def is_loopback(host: str) -> bool:
    """Return whether an address or a host name is this machine's own."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def batched_by_size(sizes: Sequence[int], max_items: int, max_bytes: int) -> list[list[int]]:
    """Split the indices of ``sizes`` in order into lists of at most ``max_items`` and ``max_bytes``.

    An item that is larger by itself gets a list of its own.
    """
    lists: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not lists or len(lists[-1]) == max_items or total + size > max_bytes:
            lists.append([])
            total = 0
        lists[-1].append(index)
        total += size
    return lists


def _prompt(value: Any) -> Prompt:
    if not isinstance(value, dict) or set(value) - {"text", "metadata"} or not isinstance(value.get("text"), str):
        raise WireError("malformed", 'each prompt must be an object with "text" and, if it has any, "metadata"')
    metadata = value.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise WireError("malformed", "the metadata of a prompt must be an object or null")
    return Prompt(value["text"], metadata)


def _object(body: bytes) -> dict[str, Any]:
    """Read a JSON object of this protocol's schema, without NaN and infinities."""

    def refuse(name: str) -> float:
        raise ValueError(f"JSON has no {name}")

    try:
        fields = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise WireError("malformed", "this is not JSON") from None
    if not isinstance(fields, dict):
        raise WireError("malformed", "this is not a JSON object")
    if (schema := fields.get("schema")) != SCHEMA:
        raise WireError("schema", f"this side speaks schema {SCHEMA}, the other {schema!r}: use one genalign version")
    return fields


def _dumped(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
