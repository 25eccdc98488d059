"""What travels between a reward server and its clients: JSON, PNG and WAV in one multipart body. No pickle.

``POST /v1/score`` carries ``multipart/form-data`` with a part ``meta`` (JSON: schema, request_id, deadline_ms, prompts)
and one part per prompt: ``image.0``, ``image.1``, ... (8-bit RGB PNG) or ``audio.0``, ... (float32 or 16-bit WAV). The
reply is JSON with one score or null per sample: JSON has no NaN, and no number stands for a failure.

A change that an older side would misread takes a new ``SCHEMA``; either side refuses a schema that is not its own.
"""

from __future__ import annotations

import io
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genalign.types import Prompt

SCHEMA = 1
LONGEST_DEADLINE = 3600.0
_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")

Media = Literal["image", "audio"]


class WireError(ValueError):
    """A message that does not keep to the protocol, or a sample that cannot be read; ``code`` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Info:
    """What a server scores, and how much of it at once. ``sample_rate`` in Hz is None where it scores images."""

    name: str
    version: str
    max_batch: int
    max_bytes: int
    max_pixels: int
    sample_rate: int | None = None
    higher_is_better: bool = True
    schema: int = SCHEMA

    @property
    def media(self) -> Media:
        """What kind of sample it scores."""
        return "image" if self.sample_rate is None else "audio"

    def to_json(self) -> bytes:
        """As ``GET /v1/info`` answers."""
        return _dumped(asdict(self))


@dataclass(frozen=True)
class ItemError:
    """Why one sample has no score; ``code`` is for programs."""

    code: str
    message: str


@dataclass(frozen=True)
class Request:
    """``samples`` are encoded, one per prompt. ``deadline`` is how many seconds the client will wait."""

    request_id: str
    deadline: float
    prompts: tuple[Prompt, ...]
    media: Media
    samples: tuple[bytes, ...]

    def pack(self) -> tuple[str, bytes]:
        """Content type and body. Raises ValueError for metadata that JSON cannot hold."""
        meta = {
            "schema": SCHEMA,
            "request_id": self.request_id,
            "deadline_ms": max(1, round(self.deadline * 1000)),
            "prompts": [prompt_json(prompt) for prompt in self.prompts],
        }
        named = {f"{self.media}.{index}": sample for index, sample in enumerate(self.samples)}
        return pack_parts({"meta": _dumped(meta)} | named)


@dataclass(frozen=True)
class Reply:
    """One score or None per sample, and why it is None; ``seconds`` is the time spent on the server."""

    request_id: str
    version: str
    scores: tuple[float | None, ...]
    errors: tuple[ItemError | None, ...]
    seconds: float

    def to_json(self) -> bytes:
        """As ``POST /v1/score`` answers."""
        return _dumped({"schema": SCHEMA, **asdict(self)})


def prompt_json(prompt: Prompt) -> dict[str, Any]:
    """A prompt as it travels. Raises ValueError for metadata that JSON cannot hold."""
    plain = {"text": prompt.text, "metadata": None if prompt.metadata is None else dict(prompt.metadata)}
    try:
        _dumped(plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of prompt {prompt.text!r} cannot travel as JSON: {error}") from None
    return plain


def unpack_info(body: bytes) -> Info:
    """The answer of ``GET /v1/info``. Raises WireError for another schema, or another service's answer."""
    found = _object(body)
    _same_schema(found)
    names = Info.__dataclass_fields__
    try:
        info = Info(**{name: value for name, value in found.items() if name in names})
        counts = (info.max_batch, info.max_bytes, info.max_pixels)
        if not all(isinstance(count, int) and count > 0 for count in counts) or info.higher_is_better is not True:
            raise TypeError("its limits are not positive integers, or lower is better")
    except TypeError as error:
        raise WireError("malformed", f"this is not a genalign reward server: {error}") from None
    return info


def unpack_request(content_type: str, body: bytes) -> Request:
    """A request from its content type and body. Raises WireError."""
    parts = unpack_parts(content_type, body)
    if "meta" not in parts:
        raise WireError("malformed", "the part named meta is missing")
    request_id, deadline, prompts = _meta(parts.pop("meta"))
    media: Media = "audio" if "audio.0" in parts else "image"
    names = [f"{media}.{index}" for index in range(len(prompts))]
    if set(names) != set(parts):
        raise WireError("count", f"{len(prompts)} prompts need the parts {media}.0 to {names[-1]}, and no others")
    seconds = min(deadline / 1000, LONGEST_DEADLINE)
    samples = tuple(parts[name] for name in names)
    return Request(request_id, seconds, tuple(_prompt(value) for value in prompts), media, samples)


def _meta(part: bytes) -> tuple[str, int, list[Any]]:
    """The id of a request, its deadline in milliseconds, and its prompts, one or more."""
    meta = _object(part)
    _same_schema(meta)
    if unknown := set(meta) - {"schema", "request_id", "deadline_ms", "prompts"}:
        raise WireError("unknown_field", f"meta has unknown fields: {', '.join(sorted(unknown))}")
    request_id, deadline, prompts = meta.get("request_id"), meta.get("deadline_ms"), meta.get("prompts")
    if not isinstance(request_id, str) or not _IDENTIFIER.fullmatch(request_id):
        raise WireError("malformed", "request_id must be 1 to 64 letters, digits, - or _")
    if not isinstance(deadline, int) or isinstance(deadline, bool) or deadline <= 0:
        raise WireError("malformed", "deadline_ms must be a positive integer")
    if not isinstance(prompts, list) or not prompts:
        raise WireError("malformed", "prompts must be a list with one entry per sample")
    return request_id, deadline, prompts


def unpack_reply(body: bytes, request_id: str, count: int) -> Reply:
    """The reply to a request of ``count`` samples. Raises WireError where it is not one."""
    found = _object(body)
    _same_schema(found)
    scores, errors = found.get("scores"), found.get("errors")
    if not isinstance(scores, list) or not isinstance(errors, list) or not len(scores) == len(errors) == count:
        raise WireError("malformed", f"the reply does not hold {count} scores and errors")
    if found.get("request_id") != request_id:
        raise WireError("malformed", "the reply belongs to another request")
    try:
        return Reply(
            request_id,
            str(found["version"]),
            tuple(_score(value) for value in scores),
            tuple(None if value is None else ItemError(str(value["code"]), str(value["message"])) for value in errors),
            float(found["seconds"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError("malformed", f"the reply cannot be read: {type(error).__name__}: {error}") from None


def pack_parts(parts: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Named parts as multipart/form-data (RFC 7578): content type and body."""
    boundary = uuid.uuid4().hex
    body = io.BytesIO()
    for name, content in parts.items():
        body.write(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode())
        body.write(content)
        body.write(b"\r\n")
    body.write(f"--{boundary}--\r\n".encode())
    return f"multipart/form-data; boundary={boundary}", body.getvalue()


def unpack_parts(content_type: str, body: bytes) -> dict[str, bytes]:
    """Parts by name. Raises WireError for what is not multipart/form-data, or has a name twice."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary:
        raise WireError("media_type", "send multipart/form-data with a boundary")
    first, *middle = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("ascii", "replace"))
    if first.strip() or not middle or not middle[-1].startswith(b"--"):
        raise WireError("malformed", "the multipart body does not begin or end with its boundary")
    parts: dict[str, bytes] = {}
    for part in middle[:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        name = BytesHeaderParser().parsebytes(head.lstrip()).get_param("name", header="content-disposition")
        if not separator or not isinstance(name, str) or name in parts:
            raise WireError("malformed", "a part has no name of its own")
        parts[name] = content
    return parts


def encode_image(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1] as PNG, rounded to 8 bits and otherwise lossless."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(content: bytes, max_pixels: int) -> Tensor:
    """An image (3, H, W) in [0, 1] from an 8-bit RGB PNG. Raises WireError; the size is judged before decoding."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as file:
            if file.width * file.height > max_pixels:
                raise WireError("too_large", f"{file.width} x {file.height} is more than {max_pixels} pixels")
            if file.mode != "RGB":
                raise WireError("undecodable", f"a PNG of mode {file.mode}: send 8-bit RGB")
            pixels = np.array(file)
    except WireError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise WireError("undecodable", "this is not a PNG image") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def encode_audio(waveform: Tensor, sample_rate: int) -> bytes:
    """A waveform (C, L) at ``sample_rate`` Hz as 32-bit float WAV, lossless."""
    from scipy.io import wavfile

    buffer = io.BytesIO()
    wavfile.write(buffer, sample_rate, waveform.detach().float().cpu().numpy().T)
    return buffer.getvalue()


def decode_audio(content: bytes, sample_rate: int) -> Tensor:
    """A waveform (C, L) from WAV of float32 or 16-bit samples. Raises WireError, also for another rate in Hz."""
    from scipy.io import wavfile

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


def packed(sizes: Sequence[int], max_items: int, max_bytes: int) -> list[list[int]]:
    """Indices of ``sizes`` in order, in lists of at most ``max_items`` and, but for single ones, ``max_bytes``."""
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


def _score(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a score")
    return float(value)


def _same_schema(found: Mapping[str, Any]) -> None:
    if found.get("schema") != SCHEMA:
        raise WireError(
            "schema",
            f"this side speaks schema {SCHEMA}, the other {found.get('schema')!r}: use one version of genalign",
        )


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise WireError("malformed", "this is not JSON") from None
    if not isinstance(found, dict):
        raise WireError("malformed", "this is not a JSON object")
    return found


def _refused(name: str) -> float:
    raise ValueError(f"JSON has no {name}")


def _dumped(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
