"""A reward behind HTTP, for a model that needs another environment or machine than the training. Extra: serve.

``GET /healthz``, ``GET /readyz``, ``GET /v1/info`` and ``POST /v1/score``: ``genalign.scoring.protocol`` defines the
messages, ``rewards.remote.remote_reward`` is the client. One thread calls the reward, first with a placeholder, so
weights are loaded before the server is ready. A sample that cannot be scored is null with a reason. Status 400, 413,
415 and 422 mean that the request is wrong, 401 that the token is; after 408, 429, 503 and 504 it may be sent again with
the same request_id, which is scored only once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from genalign.scoring import protocol
from genalign.scoring.protocol import SampleError, ServerInfo, WireError
from genalign.scoring.server_worker import DRAIN_SECONDS, ScoringJob, Worker
from genalign.types import RewardFunction

_MAX_CACHED_JOBS = 256  # finished requests whose answers are retained for a client that sends them again
_UPLOAD_SECONDS = 60.0


class Refusal(WireError):
    """A refused request: HTTP status, a code for programs, and a message that says what to do instead."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(code, message)
        self.status, self.retry_after = status, retry_after


class Service:
    """The handlers of a reward server for up to ``max_requests`` requests at a time; ``token`` None needs no token."""

    def __init__(self, worker: Worker, info: ServerInfo, token: str | None, max_requests: int) -> None:
        self.worker = worker
        self._info, self._token, self._max_requests = info, token, max_requests
        self._active = 0
        self._jobs: OrderedDict[str, tuple[bytes, ScoringJob]] = OrderedDict()

    async def health(self, request: Request) -> Response:
        """Answer as long as the process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answer once the reward is loaded."""
        self._require_ready()
        return JSONResponse({"status": "ok"})

    async def info(self, request: Request) -> Response:
        """Describe the reward and its limits."""
        self._authorize(request)
        return Response(self._info.to_json(), media_type="application/json")

    async def score(self, request: Request) -> Response:
        """Score a request's samples, once per request_id."""
        started = time.monotonic()
        self._authorize(request)
        self._require_ready()
        with self._admitted():
            body = await read_body(request, self._info.max_bytes, "send fewer samples at a time")
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                raise WireError("media_type", "send application/json")
            score_request = protocol.unpack_request(body)
            deadline = started + score_request.deadline
            job = await self._job(score_request, deadline)
            try:
                answer = asyncio.shield(asyncio.wrap_future(job.answer))
                outcomes = await asyncio.wait_for(answer, max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                outcomes = None
        if outcomes is None:
            raise Refusal(504, "deadline", "the deadline passed first: send the request again with the same request_id")
        seconds = time.monotonic() - started
        reply = protocol.ScoreReply(score_request.request_id, self._info.version, tuple(outcomes), seconds)
        return Response(reply.to_json(), media_type="application/json")

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token.encode()):
            raise Refusal(401, "token", "this server needs its bearer token: set it in the client's environment")

    def _require_ready(self) -> None:
        if (state := self.worker.state()) != "ready":
            raise Refusal(503, state, f"this server is {state}: try again", retry_after=1)

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count a request against ``max_requests`` before its body is read, which bounds the memory."""
        if self._active >= self._max_requests:
            raise Refusal(429, "busy", f"{self._active} requests are being scored: try again", retry_after=1)
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def _job(self, score_request: protocol.ScoreRequest, deadline: float) -> ScoringJob:
        """Return the queued, running or finished job of this request_id, or queue a new one."""
        digest = score_request.digest()
        if job := self._existing(score_request.request_id, digest, deadline):
            return job
        if score_request.media != self._info.media:
            raise Refusal(415, "media_type", f"this server scores {self._info.media}, not {score_request.media}")
        count, most = len(score_request.samples), self._info.max_batch
        if count > most:
            raise Refusal(422, "count", f"{count} samples are more than max_batch {most}: send fewer at a time")
        samples = await run_in_threadpool(lambda: [_decode(content, self._info) for content in score_request.samples])
        if job := self._existing(score_request.request_id, digest, deadline):  # sent again while this one was decoded
            return job
        job = ScoringJob(score_request.request_id, samples, score_request.prompts, deadline)
        self._jobs[score_request.request_id] = digest, job
        if len(self._jobs) > _MAX_CACHED_JOBS:
            self._jobs.popitem(last=False)
        self.worker.submit(job)
        return job

    def _existing(self, request_id: str, digest: bytes, deadline: float) -> ScoringJob | None:
        old, job = self._jobs.get(request_id, (None, None))
        if job is None or (job.answer.done() and job.answer.result() is None):
            return None
        if old != digest:
            raise Refusal(422, "request_id", "this request_id belongs to other samples: use a new one for each request")
        job.deadline = max(job.deadline, deadline)
        return job


def _decode(content: bytes, info: ServerInfo) -> Tensor | SampleError:
    try:
        if info.sample_rate is None:
            return protocol.decode_image(content, info.max_pixels)
        return protocol.decode_audio(content, info.sample_rate)
    except WireError as error:
        return SampleError(error.code, str(error))


async def read_body(request: Request, limit: int, advice: str) -> bytes:
    """Read a request's body of at most ``limit`` bytes.

    Raises Refusal for a larger one, with ``advice`` on what to do, and for one that does not arrive.
    """
    too_large = Refusal(413, "too_large", f"the body is over {limit} bytes: {advice}")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    chunks, total = [], 0
    try:
        async with asyncio.timeout(_UPLOAD_SECONDS):
            async for chunk in request.stream():
                total += len(chunk)
                if total > limit:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise Refusal(408, "slow", f"the body did not arrive in {_UPLOAD_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise Refusal(408, "gone", "the client left before its body arrived") from None
    return b"".join(chunks)


def answer_refusal(request: Request, error: Exception) -> Response:
    """Answer a request that was refused, or that breaks the protocol, with the reason as JSON."""
    assert isinstance(error, WireError)
    if not isinstance(error, Refusal):
        error = Refusal({"media_type": 415, "count": 422}.get(error.code, 400), error.code, str(error))
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"error": {"code": error.code, "message": str(error)}}, error.status, headers)


def placeholder(info: ServerInfo) -> Tensor:
    """Return a gray image (3, 64, 64), or one second of silence (1, L), to load a reward with."""
    return torch.full((3, 64, 64), 0.5) if info.sample_rate is None else torch.zeros(1, info.sample_rate)


def build_app(
    reward: RewardFunction,
    info: ServerInfo,
    token: str | None = None,
    max_requests: int = 16,
    device: str = "cpu",
    first: Tensor | None = None,
) -> Starlette:
    """Build the ASGI application that serves ``reward``.

    Args:
        reward: the reward to call.
        info: its name, version, kind of sample, and limits of a request.
        token: the bearer token that clients must send; None needs none.
        max_requests: how many bodies, of ``info.max_bytes`` at most, are held at a time.
        device: where the samples are when the reward is called.
        first: a sample to score before the server is ready, so weights are loaded.
    """
    service = Service(Worker(reward, info.max_batch, device, first), info, token, max_requests)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.worker.close)

    return Starlette(
        routes=[
            Route("/healthz", service.health),
            Route("/readyz", service.ready),
            Route("/v1/info", service.info),
            Route("/v1/score", service.score, methods=["POST"]),
        ],
        exception_handlers={WireError: answer_refusal},
        lifespan=lifespan,
    )


def require_safe(host: str, token: str | None, variable: str) -> None:
    """Raise ValueError for an address that other machines can reach, if no token is set in the environment."""
    if not protocol.is_loopback(host) and not token:
        raise ValueError(f"{host} can be reached by others: set a token in the environment variable {variable}")


def listen(host: str, port: int) -> socket.socket:
    """Open a socket on ``host``; port 0 takes a free one. Raises ValueError if the port is taken."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = f"cannot listen on {host}:{port} ({error.strerror})"
        raise ValueError(f"{reason}: choose another --host or --port") from None


def server(app: Starlette) -> uvicorn.Server:
    """Create a uvicorn server for ``app`` whose idle connections stay open longer than the client's."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=75)
    config.timeout_graceful_shutdown = DRAIN_SECONDS
    return uvicorn.Server(config)
