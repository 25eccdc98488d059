"""A reward behind HTTP, for a model that needs another environment or machine than the training. Extra: serve.

``GET /healthz``, ``GET /readyz``, ``GET /v1/info`` and ``POST /v1/score``; see ``genalign.scoring.protocol`` for what travels and
``rewards.remote.remote_reward`` for the client. One thread calls the reward, and before all others with a sample of no meaning, so
that weights are open once it is ready. What cannot be scored is null with a reason, sample by sample. Answers: 400,
413, 415 and 422 say that the request is wrong, 401 that the token is; 408, 429, 503 and 504 that it may be sent again,
with the same request_id, which is then scored once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from genalign.scoring import protocol
from genalign.scoring.protocol import Info, ItemError
from genalign.scoring.server_worker import DRAIN_SECONDS, Job, Scored, Worker
from genalign.types import RewardFunction

_REMEMBERED = 256  # finished requests whose answers are kept for a client that asks again
_UPLOAD_SECONDS = 60.0


class Refusal(Exception):
    """A request that is not scored: its status, a code for programs, and what to do instead."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class Service:
    """The handlers of a reward server. ``max_requests`` are taken in at a time; ``token`` None asks for none."""

    def __init__(self, worker: Worker, info: Info, token: str | None, max_requests: int) -> None:
        self.worker = worker
        self._info, self._token, self._max_requests = info, token, max_requests
        self._inside = 0
        self._jobs: OrderedDict[str, tuple[bytes, Job]] = OrderedDict()

    async def health(self, request: Request) -> Response:
        """The process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Scores are being given."""
        self._require_ready()
        return JSONResponse({"status": "ok"})

    async def info(self, request: Request) -> Response:
        """What is scored here."""
        self._authorize(request)
        return Response(self._info.to_json(), media_type="application/json")

    async def score(self, request: Request) -> Response:
        """Score a request's samples, once for each request_id."""
        started = time.monotonic()
        self._authorize(request)
        self._require_ready()
        with self._place():
            body = await self._body(request)
            asked = protocol.unpack_request(request.headers.get("content-type", ""), body)
            job = await self._job(asked, started + asked.deadline)
            scored = await self._answer(job, started + asked.deadline)
        scores = tuple(item.score for item in scored)
        errors = tuple(item.error for item in scored)
        reply = protocol.Reply(asked.request_id, self._info.version, scores, errors, time.monotonic() - started)
        return Response(reply.to_json(), media_type="application/json")

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            raise Refusal(401, "token", "this server needs its bearer token: set it in the client's environment")

    def _require_ready(self) -> None:
        if (state := self.worker.state()) != "ready":
            raise Refusal(503, state, f"this server is {state}: try again", retry_after=1)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places inside, before anything of the body is read: memory is bounded by them."""
        if self._inside >= self._max_requests:
            raise Refusal(429, "busy", f"{self._inside} requests are being scored: try again", retry_after=1)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def _body(self, request: Request) -> bytes:
        limit = self._info.max_bytes
        too_large = Refusal(413, "too_large", f"the body is over {limit} bytes: send fewer samples at a time")
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

    async def _job(self, asked: protocol.Request, deadline: float) -> Job:
        """The queued, running or finished job of this request_id, else a new one."""
        digest = _digest(asked)
        if known := self._known(asked.request_id, digest, deadline):
            return known
        if asked.media != self._info.media:
            raise Refusal(415, "media_type", f"this server scores {self._info.media}, not {asked.media}")
        if len(asked.samples) > self._info.max_batch:
            raise Refusal(422, "count", f"{len(asked.samples)} samples are more than max_batch {self._info.max_batch}")
        samples = await run_in_threadpool(_decoded, asked.samples, self._info)
        if known := self._known(asked.request_id, digest, deadline):  # it came again while this one was decoded
            return known
        job = Job(asked.request_id, samples, asked.prompts, deadline)
        self._jobs[asked.request_id] = digest, job
        if len(self._jobs) > _REMEMBERED:
            self._jobs.popitem(last=False)
        self.worker.submit(job)
        return job

    def _known(self, request_id: str, digest: bytes, deadline: float) -> Job | None:
        old, job = self._jobs.get(request_id, (None, None))
        if job is None or (job.answer.done() and job.answer.result() is None):
            return None
        if old != digest:
            raise Refusal(422, "request_id", "this request_id belongs to other samples: use a new one for each request")
        job.deadline = max(job.deadline, deadline)
        return job

    async def _answer(self, job: Job, deadline: float) -> list[Scored]:
        waiting = asyncio.shield(asyncio.wrap_future(job.answer))
        try:
            scored = await asyncio.wait_for(waiting, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            scored = None
        if scored is None:
            raise Refusal(504, "deadline", "the deadline passed first: ask again with the same request_id")
        return scored


def _digest(asked: protocol.Request) -> bytes:
    digest = hashlib.sha256(json.dumps([protocol.prompt_json(prompt) for prompt in asked.prompts]).encode())
    for sample in asked.samples:
        digest.update(hashlib.sha256(sample).digest())
    return digest.digest()


def _decoded(samples: Sequence[bytes], info: Info) -> list[Tensor | ItemError]:
    decoded: list[Tensor | ItemError] = []
    for content in samples:
        try:
            if info.sample_rate is None:
                decoded.append(protocol.decode_image(content, info.max_pixels))
            else:
                decoded.append(protocol.decode_audio(content, info.sample_rate))
        except protocol.WireError as error:
            decoded.append(ItemError(error.code, str(error)))
    return decoded


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"error": {"code": error.code, "message": str(error)}}, error.status, headers)


def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, protocol.WireError)
    status = {"media_type": 415, "count": 422}.get(error.code, 400)
    return JSONResponse({"error": {"code": error.code, "message": str(error)}}, status)


def meaningless(info: Info) -> Tensor:
    """A grey image (3, 64, 64), or a second of silence (1, L), to try a reward with."""
    return torch.full((3, 64, 64), 0.5) if info.sample_rate is None else torch.zeros(1, info.sample_rate)


def build_app(
    reward: RewardFunction,
    info: Info,
    token: str | None = None,
    max_requests: int = 16,
    device: str = "cpu",
    first: Tensor | None = None,
) -> Starlette:
    """The ASGI application that serves ``reward``, on samples on ``device``; it is ready once ``first`` has been tried,
    if that is given. At most ``max_requests`` bodies of ``info.max_bytes`` are held at a time."""
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
        exception_handlers={Refusal: _refused, protocol.WireError: _malformed},
        lifespan=lifespan,
    )


def require_safe(host: str, token: str | None, variable: str) -> None:
    """Raises ValueError for an address that other machines reach, without a token in the environment."""
    loopback = host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ipaddress.ip_address(host).is_loopback
    if not loopback and not token:
        raise ValueError(f"{host} can be reached by others: set a token in the environment variable {variable}")


def listen(host: str, port: int) -> socket.socket:
    """A socket on ``host``; port 0 takes a free one. Raises ValueError where it is taken."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
        ) from None


def server(app: Starlette) -> uvicorn.Server:
    """A uvicorn server for ``app``; idle connections stay open longer than the client keeps them."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
