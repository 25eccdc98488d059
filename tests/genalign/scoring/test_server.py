"""The reward server over loopback, as clients of any kind see it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from torch import Tensor

from genalign.scoring import protocol
from genalign.scoring.protocol import Outcome, SampleError
from genalign.scoring.server import listen, placeholder, require_safe
from genalign.scoring.server_worker import ScoringJob, Worker, score_each
from genalign.types import Prompt
from tests.fake_streams import FakeStreams
from tests.fake_streams import streams as streams
from tests.http_servers import INFO, serving


@dataclass
class Gated:
    """Mean levels, once ``gate`` is open; it remembers the sizes of its batches."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.batches.append(len(samples))
        self.entered.set()
        assert self.gate.wait(20)
        return brightness(samples, prompts)


def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(brightness) as address:
        yield address


def call(url: str, method: str, path: str, body: bytes = b"", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.request(method, url + path, content=body, headers=named)


def request(levels: Sequence[float], name: str = "r", deadline: float = 20) -> protocol.ScoreRequest:
    images = tuple(protocol.encode_image(torch.full((3, 4, 4), level)) for level in levels)
    return protocol.ScoreRequest(name, deadline, tuple(Prompt("grey") for _ in levels), "image", images)


def post(url: str, sent: protocol.ScoreRequest, **headers: str) -> httpx.Response:
    return call(url, "POST", "/v1/score", sent.to_json(), Content_Type="application/json", **headers)


def outcomes(url: str, sent: protocol.ScoreRequest) -> Sequence[Outcome]:
    answer = post(url, sent)
    assert answer.status_code == 200
    reply = protocol.unpack_reply(answer.content, sent.request_id, len(sent.samples))
    assert reply.version == "1"
    return reply.outcomes


def test_info_and_health(url: str) -> None:
    assert protocol.unpack_info(call(url, "GET", "/v1/info").content) == INFO
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/v1/score", 405), ("/nowhere", 404)):
        assert call(url, "GET", path).status_code == status


def test_undecodable_sample_is_null_with_a_reason(url: str) -> None:
    sent = request([0.0, 1.0])
    broken = replace(sent, prompts=(*sent.prompts, Prompt("x")), samples=(*sent.samples, b"GIF89a"))
    *scores, error = outcomes(url, broken)
    assert scores == [0.0, 1.0] and isinstance(error, SampleError) and error.code == "undecodable"


def test_images_of_different_sizes_are_scored(url: str) -> None:
    sides = (3, 9, 3, 5)
    samples = tuple(protocol.encode_image(torch.full((3, side, 4), side / 255)) for side in sides)
    mixed = protocol.ScoreRequest("mixed", 20, (Prompt("x"),) * 4, "image", samples)
    assert outcomes(url, mixed) == pytest.approx([side / 255 for side in sides], abs=1e-6)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


AUDIO = protocol.ScoreRequest("a", 5, (Prompt("x"),), "audio", (protocol.encode_audio(torch.zeros(1, 4), 8000),))


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("multipart/form-data; boundary=x", b"{}", 415, "media_type"),
        ("application/octet-stream", b"\x80\x04K*.", 415, "media_type"),
        ("application/json", b"nothing", 400, "malformed"),
        ("application/json; charset=utf-8", b"{}", 400, "schema"),
        ("application/json", request([0.5] * 9, "many").to_json(), 422, "count"),
        ("application/json", AUDIO.to_json(), 415, "media_type"),
        ("application/json", b"x" * (INFO.max_bytes + 1), 413, "too_large"),
    ],
    ids=["multipart", "pickle", "no JSON", "no schema", "too many", "audio", "too large"],
)
def test_unscorable_request_is_refused(url: str, kind: str, body: bytes, status: int, code: str) -> None:
    assert refusal(call(url, "POST", "/v1/score", body, Content_Type=kind)) == (status, code)


def test_oversize_body_without_a_length_is_refused_before_it_is_stored(url: str) -> None:
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    with socket.create_connection((host, port), timeout=20) as sock:
        sock.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(17):  # exactly at the limit, and one more
            sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert b"413" in sock.recv(100)


def test_token_is_checked_before_the_body_is_read() -> None:
    with serving(brightness, token="s3cret") as url:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            assert call(url, "GET", "/v1/info", **header).status_code == 401
            assert call(url, "POST", "/v1/score", b"", **header).status_code == 401
        assert call(url, "GET", "/healthz").status_code == 200
        assert post(url, request([0.5]), Authorization="Bearer s3cret").status_code == 200


def test_request_id_is_scored_once_and_for_one_request() -> None:
    reward = Gated()
    with serving(reward) as url, ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(post, url, request([0.2, 0.4])) for _ in range(2)]
        reward.gate.set()
        first, second = (answer.result().json() for answer in answers)
        assert first["scores"] == second["scores"] and reward.batches == [2]
        assert refusal(post(url, request([0.3, 0.4]))) == (422, "request_id")


def test_request_past_its_deadline_can_be_sent_again() -> None:
    reward = Gated()
    with serving(reward) as url:
        assert refusal(post(url, request([0.2], deadline=0.1))) == (504, "deadline")
        assert post(url, request([0.6], "waiting", deadline=0.1)).status_code == 504  # behind the first, never scored
        reward.gate.set()
        assert outcomes(url, request([0.2])) == (pytest.approx(0.2, abs=0.002),)
        assert outcomes(url, request([0.6], "waiting")) == (pytest.approx(0.6, abs=0.002),)
    assert reward.batches == [1, 1]


def test_waiting_requests_are_scored_together() -> None:
    reward = Gated()
    with serving(reward) as url, ThreadPoolExecutor(8) as threads:
        first = threads.submit(post, url, request([0.1], "first"))
        assert reward.entered.wait(10)
        rest = [threads.submit(post, url, request([n / 10] * 3, f"n{n}")) for n in range(4)]
        time.sleep(1.0)
        reward.gate.set()
        assert first.result().status_code == 200
        for n, answer in enumerate(rest):
            assert answer.result().json()["scores"] == pytest.approx([n / 10] * 3, abs=0.002)
    assert sum(reward.batches) == 13 and len(reward.batches) < 5 and max(reward.batches) <= INFO.max_batch


def test_requests_over_the_limit_are_refused() -> None:
    reward = Gated()
    with serving(reward, max_requests=1) as url, ThreadPoolExecutor(1) as threads:
        first = threads.submit(post, url, request([0.1]))
        assert reward.entered.wait(10)
        answer = post(url, request([0.1], "second"))
        assert refusal(answer) == (429, "busy") and answer.headers["retry-after"] == "1"
        reward.gate.set()
        assert first.result().status_code == 200


def test_server_is_ready_after_scoring_a_placeholder() -> None:
    reward = Gated()
    with serving(reward, first=placeholder(INFO)) as url:
        assert reward.entered.wait(20)
        assert call(url, "GET", "/healthz").status_code == call(url, "GET", "/v1/info").status_code == 200
        loading = [call(url, "GET", "/readyz"), post(url, request([0.1]))]
        assert [refusal(answer) for answer in loading] == [(503, "loading")] * 2
        assert all(answer.headers["retry-after"] == "1" for answer in loading)
        reward.gate.set()
        while call(url, "GET", "/readyz").status_code != 200:
            time.sleep(0.01)
        assert post(url, request([0.1])).status_code == 200
    assert reward.batches == [1, 1]


def test_reward_that_fails_on_the_placeholder_is_served_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def needy(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if any(prompt.metadata is None for prompt in prompts):
            raise ValueError("no metadata")
        return brightness(samples, prompts)

    with serving(needy, first=placeholder(replace(INFO, sample_rate=100))) as url:
        while call(url, "GET", "/readyz").status_code != 200:
            time.sleep(0.01)
    assert "request at the start, of a sample without meaning or metadata: the reward raised ValueError" in caplog.text


def test_stopping_finishes_queued_requests() -> None:
    reward = Gated()
    with ThreadPoolExecutor(1) as threads:
        with serving(reward) as url:
            first = threads.submit(post, url, request([0.1]))
            assert reward.entered.wait(10)
            threading.Timer(0.3, reward.gate.set).start()
        assert first.result().status_code == 200


def test_bad_sample_costs_a_few_calls() -> None:
    calls = []

    def poisoned(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(len(samples))
        if bool((samples == 9).any()):
            raise RuntimeError
        return brightness(samples, prompts)

    samples = torch.arange(16.0).view(16, 1, 1, 1)
    scored = score_each(poisoned, samples, [Prompt("x")] * 16, "name")
    assert scored[:9] + scored[10:] == [float(n) for n in range(16) if n != 9]
    assert len(calls) == 9 and isinstance(scored[9], SampleError) and scored[9].code == "reward_failed"


@pytest.mark.parametrize("wrong", [torch.zeros(4, 1), torch.tensor(0.0), [0.0] * 4, torch.full((4,), torch.nan)])
def test_invalid_score_is_null(wrong: object) -> None:
    scored = score_each(lambda samples, prompts: wrong, torch.rand(4, 3, 2, 2), [Prompt("x")] * 4, "name")
    assert len(scored) == 4 and all(isinstance(outcome, SampleError) for outcome in scored)


def test_only_loopback_needs_no_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        require_safe(host, None, "T")
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        require_safe(host, "token", "T")
        with pytest.raises(ValueError, match=r"can be reached by others: set a token in the environment variable T"):
            require_safe(host, None, "T")


def test_busy_port_is_refused_with_advice() -> None:
    message = r"cannot listen on 127\.0\.0\.1:\d+ .*choose another --host or --port"
    with listen("127.0.0.1", 0) as sock, pytest.raises(ValueError, match=message):
        listen("127.0.0.1", sock.getsockname()[1])


def test_the_thread_that_calls_the_reward_is_on_its_gpu(streams: FakeStreams) -> None:
    def device(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.full((len(samples),), float(torch.cuda.current_device()))

    for name, index in (("cuda:3", 3), ("cuda", 2)):
        torch.cuda.set_device(2)
        worker = Worker(device, 4, name)
        worker._device = torch.device("cpu")  # where this machine can put samples
        job = ScoringJob("one", [torch.zeros(3, 2, 2)], [Prompt("")], time.monotonic() + 60)
        worker.submit(job)
        assert job.answer.result(10) == [index]
        worker.close()
