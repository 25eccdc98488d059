"""The messages between a reward server and its clients, without a server."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from genalign.scoring import protocol
from genalign.scoring.protocol import SampleError, WireError
from genalign.types import Prompt
from tests.packages import folder_of

REQUEST = protocol.ScoreRequest(
    "r-1", 2.5, (Prompt("one", {"count": [1]}), Prompt("two")), "image", (b"\r\n--\r\n\x00", b"")
)


def message(**changes: object) -> bytes:
    plain = {"schema": 2, "request_id": "r", "deadline_ms": 5, "media": "image", "prompts": [{"text": "a"}]}
    return json.dumps({**plain, "samples": [""], **changes}).encode()


def test_requests_and_replies_survive_json() -> None:
    assert protocol.unpack_request(REQUEST.to_json()) == REQUEST
    reply = protocol.ScoreReply("r-1", "v", (0.1, SampleError("unscorable", "why")), 0.25)
    assert protocol.unpack_reply(reply.to_json(), "r-1", 2) == reply
    with pytest.raises(WireError, match="belongs to another request"):
        protocol.unpack_reply(reply.to_json(), "r-2", 2)
    with pytest.raises(ValueError, match="JSON compliant"):
        protocol.ScoreReply("r-1", "v", (float("nan"),), 0.25).to_json()


NOT_JSON = [b"{", b"[" * 100_000, b"\x80\x04K*.", b'{"schema": 2, "deadline_ms": NaN}']
BAD = [
    *((body, "malformed", "not JSON") for body in NOT_JSON),
    (b"[1]", "malformed", "not a JSON object"),
    (message(schema=1), "schema", "the other 1: use one genalign version"),
    (message(want_components=True), "unknown_field", "want_components"),
    *((message(request_id=name), "malformed", "request_id") for name in ("a\nb", "x" * 65)),
    *((message(deadline_ms=value), "malformed", "deadline_ms") for value in (0, True)),
    (message(media="video"), "media_type", "image"),
    (message(prompts=[]), "malformed", "must be lists"),
    (message(samples="QQ=="), "malformed", "must be lists"),
    (message(prompts=["a"]), "malformed", 'object with "text"'),
    (message(prompts=[{"text": "a", "metadata": 3}]), "malformed", "an object or null"),
    (message(samples=[]), "count", "1 prompts need as many samples, not 0"),
    (message(samples=["", ""]), "count", "not 2"),
    *((message(samples=[sample]), "malformed", "base64") for sample in ("*", 1)),
]


@pytest.mark.parametrize(("body", "code", "pattern"), BAD, ids=[f"{code}-{n}" for n, (_, code, _) in enumerate(BAD)])
def test_request_that_breaks_the_protocol_is_refused(body: bytes, code: str, pattern: str) -> None:
    with pytest.raises(WireError, match=pattern) as raised:
        protocol.unpack_request(body)
    assert raised.value.code == code


def test_images_travel_as_8_bits() -> None:
    image = torch.rand(3, 5, 7)
    read = protocol.decode_image(protocol.encode_image(image), 35)
    assert torch.equal((read * 255).round(), (image * 255).round())
    assert torch.equal(protocol.decode_image(protocol.encode_image(read), 35), read)
    beyond = torch.tensor([-1.0, 2.0]).view(1, 1, 2).expand(3, 1, 2)
    assert protocol.decode_image(protocol.encode_image(beyond), 35)[0, 0].tolist() == [0.0, 1.0]


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""
    header, rows = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 100)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png


def encoded(form: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, form)
    return buffer.getvalue()


UNDECODABLE = [
    encoded("PNG")[:-24],
    encoded("JPEG"),
    encoded("TIFF"),
    encoded("PNG", "RGBA"),
    bomb(10**4),
    bomb(2**31 - 1),
]


@pytest.mark.parametrize(
    ("content", "code"),
    [(bomb(300), "too_large"), *((content, "undecodable") for content in (b"", b"\x89PNG\r\n\x1a\n", *UNDECODABLE))],
)
def test_only_a_small_rgb_png_is_decoded(content: bytes, code: str) -> None:
    with pytest.raises(WireError) as raised:
        protocol.decode_image(content, 256 * 256)
    assert raised.value.code == code


def wav(rate: int, samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, samples)
    return buffer.getvalue()


def test_waveforms_travel_without_loss() -> None:
    for channels in (1, 2):
        waveform = torch.randn(channels, 300) * 3
        assert torch.equal(protocol.decode_audio(protocol.encode_audio(waveform, 44100), 44100), waveform)
    assert protocol.decode_audio(wav(8000, np.array([0, 16384, -32768], np.int16)), 8000).tolist() == [[0.0, 0.5, -1.0]]


def test_only_a_wav_of_the_sample_rate_is_decoded() -> None:
    with pytest.raises(WireError, match="a waveform of 44100 Hz: this server scores 16000 Hz"):
        protocol.decode_audio(protocol.encode_audio(torch.zeros(1, 9), 44100), 16000)
    for content in (b"", b"RIFF\0\0\0\0WAVE", b"ID3"):
        with pytest.raises(WireError, match="not a WAV"):
            protocol.decode_audio(content, 16000)
    with pytest.raises(WireError, match="send float32 or 16 bits"):
        protocol.decode_audio(wav(16000, np.zeros(4, np.uint8)), 16000)


def test_batches_are_cut_by_number_and_size() -> None:
    assert protocol.batched_by_size([1, 1, 1, 1, 1], 2, 100) == [[0, 1], [2, 3], [4]]
    assert protocol.batched_by_size([5, 5, 99, 5, 5], 10, 10) == [[0, 1], [2], [3, 4]]
    assert protocol.batched_by_size([], 2, 2) == []


def test_no_module_can_execute_what_it_receives() -> None:
    paths = [folder_of("genalign") / "scoring" / f"{name}.py" for name in ("protocol", "server", "server_worker")]
    for path in [*paths, *(folder_of("rewards") / "remote").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load", "np.load", "eval(", "exec(", "yaml", "subprocess", "os.system"):
            assert word not in source, f"{path} has {word}"
