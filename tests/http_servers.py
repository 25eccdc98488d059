"""Real HTTP servers on loopback: reward servers, and ones that answer, fail and vanish as a test tells them to."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from torch import Tensor

from genalign.scoring.protocol import ServerInfo
from genalign.scoring.server import build_app, listen, server
from genalign.types import RewardFunction

INFO = ServerInfo("grey", "1", max_batch=8, max_bytes=2**20, max_pixels=2**16)


@contextlib.contextmanager
def serving(
    reward: RewardFunction,
    info: ServerInfo = INFO,
    token: str | None = None,
    port: int = 0,
    max_requests: int = 16,
    first: Tensor | None = None,
) -> Iterator[str]:
    """The URL of a reward server, which drains and stops at the end."""
    sock = listen("127.0.0.1", port)
    running = server(build_app(reward, info, token, max_requests, first=first))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not running.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        sock.close()


def free_port() -> int:
    """A port that nothing listens on."""
    with listen("127.0.0.1", 0) as sock:
        port: int = sock.getsockname()[1]
        return port


@dataclass(frozen=True)
class Seen:
    """A request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """What a stub does: answer after ``delay`` seconds, or close the connection without a word."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False


@contextlib.contextmanager
def stub(answer: Callable[[Seen], Answer]) -> Iterator[str]:
    """The URL of a server that answers as ``answer`` says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            given = answer(Seen(self.command, self.path, headers, body))
            time.sleep(given.delay)
            with contextlib.suppress(ConnectionError):  # a client that did not wait
                if given.drop:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(given.status)
                for name, value in {"Content-Length": str(len(given.body)), **given.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(given.body)

        do_GET = do_POST = do_HEAD = _handle

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that went away

    running = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def forwarded(seen: Seen, url: str) -> Answer:
    """The answer of the server at ``url`` to the same request."""
    there = http.client.HTTPConnection(urlsplit(url).hostname or "", urlsplit(url).port, timeout=30)
    try:
        kept = {name: value for name, value in seen.headers.items() if name not in ("host", "connection")}
        there.request(seen.method, seen.path, seen.body, kept)
        answer = there.getresponse()
        return Answer(answer.status, answer.read(), {"Content-Type": answer.headers["content-type"]})
    finally:
        there.close()


@dataclass
class Faults:
    """A proxy before the server at ``url``: POSTs meet the faults of ``script`` first, one each, None meaning none."""

    url: str
    script: list[Answer | None] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered_first: bool = False  # the server scores, and the fault takes its answer's place

    def __call__(self, seen: Seen) -> Answer:
        if seen.method != "POST":
            return forwarded(seen, self.url)
        self.seen.append(seen)
        self.times.append(time.monotonic())
        fault = self.script.pop(0) if self.script else None
        if fault is None:
            return forwarded(seen, self.url)
        if self.answered_first:
            forwarded(seen, self.url)
        return fault
