"""One HTTP client for rewards that are elsewhere: which requests are sent again, for how long, and the final errors.

Tried again, with the same body: dropped connections, timeouts, 408, 425, 429, 502, 503 and 504 until the deadline, 500
twice. The pauses grow, at random up to ``Patience.longest_pause`` ("full jitter"), and are never shorter than the
server's Retry-After. Every other answer but 2xx is final. An address that has never answered this process is likely
wrong: it is tried for ``Patience.startup`` only. Extra: remote (httpx).
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from genalign.scoring.protocol import Outcome, SampleError, is_loopback

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_RETRIED_STATUSES = {408, 425, 429, 502, 503, 504}
_LARGEST_ANSWER = 2**26
_FAULTS = 2
_NOTICE_AFTER, _NOTICE_EVERY = 5.0, 30.0  # seconds of waiting until the first line that says so, and until the next
_ANSWERED: set[str] = set()  # addresses that have answered this process, in whatever way


class RemoteError(RuntimeError):
    """A server could not be reached, or refused a request."""


class Refused(RemoteError):
    """A final answer: the same request would be refused again. ``status`` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Faulty(RemoteError):
    """The server answered 500 again and again to this request; it may answer a part of it."""


class Unavailable(RemoteError):
    """The deadline, the retries or the patience with this server ended first."""


class Unreachable(RemoteError):
    """Nothing has ever answered at this address."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, in seconds, and how often to try again.

    Args:
        deadline: One call of a reward with all its retries: long enough for a server that is gone for some minutes.
        timeout: One answer.
        connect: One connection.
        startup: Connections to an address that has never answered. Raise it where the server is started at the same
            time, for as long as it takes to listen; a server that listens and still loads its weights is waited for.
        first_pause: Longest pause before the first retry; it doubles with each.
        longest_pause: Longest pause between two retries.
        retries: Number of retries in a row, over all requests of the call, without any success in between.
    """

    deadline: float = 900.0
    timeout: float = 60.0
    connect: float = 5.0
    startup: float = 5.0
    first_pause: float = 0.5
    longest_pause: float = 30.0
    retries: int = 100

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= threading.TIMEOUT_MAX:
                raise ValueError(f"patience.{name} must be a finite number of at least 0, not {value}")


@dataclass(frozen=True)
class _Retry:
    """The reason to send a request again, and the seconds to wait at least."""

    reason: str
    pause: float = 0.0
    fault: bool = False
    connected: bool = True


class HttpClient:
    """Keep-alive connections to one server, for one call of a reward; safe in threads, to be used in a ``with``.

    The environment variable ``token_variable`` holds the bearer token, if there is one: it must not be in a file of the
    run, or on a command line. Loopback addresses are reached without the proxies of the environment.
    """

    def __init__(self, url: str, token_variable: str, patience: Patience) -> None:
        try:
            import httpx
        except ImportError as error:
            raise RemoteError("httpx is missing: pip install 'genalign[remote]'") from error
        token = os.environ.get(token_variable)
        self._url, self._patience = url.rstrip("/"), patience
        self._begin = time.monotonic()
        self._end = self._begin + patience.deadline
        self._next_notice: float | None = None
        self._retries = patience.retries
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._sockets: list[socket.socket] = []
        self._alarm = threading.Timer(patience.deadline, self._hang_up)
        self._alarm.daemon = True
        self._jitter = random.SystemRandom()  # the user's seeds are not disturbed
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=30),
        )

    def __enter__(self) -> HttpClient:
        self._alarm.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._alarm.cancel()
        self._http.close()

    @property
    def remaining(self) -> float:
        """The number of seconds until the deadline."""
        return self._end - time.monotonic()

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Keep the sockets of new connections, as httpcore reports them, for the deadline."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self.remaining <= 0:
                self._hang_up()

    def _hang_up(self) -> None:
        """End the requests under way: httpx limits each read, so a server that drips headers would outlast it."""
        for connection in tuple(self._sockets):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not SSLSocket's, which forgets its state

    def post_json(self, path: str, value: Any) -> Any:
        """Send JSON and return the JSON of the answer. Raises RemoteError, and Refused if the answer is not JSON."""
        answer = self.send(path, json.dumps(value, allow_nan=False).encode())
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise Refused(200, f"{self._url}{path} did not answer with JSON: is this the right address?") from None

    def send(self, path: str, body: bytes = b"") -> bytes:
        """Send JSON by POST, or GET without a body, until there is an answer, and return its body.

        Raises RemoteError; Unreachable if nothing has ever answered there, Unavailable if no time or retries are left.
        """
        faults = attempt = 0
        while not self._stopped.is_set():
            answer = self._once(path, body)
            if isinstance(answer, bytes):
                self._retries = self._patience.retries
                return answer
            self._notice(answer)
            faults += answer.fault
            if faults > _FAULTS:
                raise Faulty(f"{self._url}{path} {answer.reason}, {faults} times: see the server's log")
            longest = min(self._patience.longest_pause, self._patience.first_pause * 2.0 ** min(attempt, 30))
            pause = max(answer.pause, self._jitter.uniform(0, longest))
            attempt += 1
            with self._lock:
                self._retries -= 1
                spent = self._retries < 0 or pause >= self.remaining
            if not spent:
                self._stopped.wait(pause)
            if spent or self.remaining <= 0:  # or the pause took longer than planned
                limits = f"{attempt} attempts of at most {self._patience.deadline:g} s"
                raise Unavailable(f"{self._url} {answer.reason}; given up after {limits}")
        raise Unavailable(f"{self._url}{path} was not sent: another request of this call failed")

    def _notice(self, answer: _Retry) -> None:
        """Log that the server is waited for: at once if it cannot be reached, else after some seconds.

        Raises Unreachable for an address that has never answered, after ``startup`` seconds.
        """
        now, new = time.monotonic(), not answer.connected and self._url not in _ANSWERED
        if new and now - self._begin >= self._patience.startup:
            raise Unreachable(
                f"{self._url} {answer.reason}: correct the address, start its server first, or give it the time to"
                f" start, as in patience: {{startup: 300}} (it was tried for {self._patience.startup:g} s)"
            )
        with self._lock:
            first = not answer.connected or now - self._begin >= _NOTICE_AFTER
            due = first if self._next_notice is None else now >= self._next_notice
            if due:
                self._next_notice = now + _NOTICE_EVERY
        if due:
            limit = self._patience.startup if new else self._patience.deadline
            logger.warning("waiting for %s, for up to %g s: it %s", self._url, limit, answer.reason)

    def _once(self, path: str, body: bytes) -> bytes | _Retry:
        import httpx

        left = self.remaining
        if left <= 0:
            return _Retry("was not reached in time")
        limits = httpx.Timeout(min(left, self._patience.timeout), connect=min(left, self._patience.connect))
        method, headers = ("POST", {"Content-Type": "application/json"}) if body else ("GET", {})
        try:
            with self._http.stream(
                method,
                self._url + path,
                content=body,
                headers=headers,
                timeout=limits,
                extensions={"trace": self._trace},
            ) as response:
                _ANSWERED.add(self._url)
                return self._read(response, path)
        except httpx.TransportError as error:
            connected = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            return _Retry(f"cannot be reached ({type(error).__name__}: {error})", connected=connected)
        except (httpx.InvalidURL, httpx.DecodingError) as error:
            raise Refused(0, f"{self._url}{path}: {error}") from None

    def _read(self, response: httpx.Response, path: str) -> bytes | _Retry:
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > _LARGEST_ANSWER:
                raise Refused(response.status_code, f"{self._url}{path} answered with over {_LARGEST_ANSWER} bytes")
        if self.remaining <= 0:  # a body without a length ends where the connection does
            return _Retry("did not finish its answer in time")
        if response.is_success:
            return bytes(content)
        # The message of an error's JSON body, as genalign and OpenAI write it, else the start of the body.
        text = content[:300].decode("utf-8", "replace")
        with suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
            error = json.loads(content)["error"]
            text = f"{error.get('code')}: {str(error.get('message'))[:300]}"
        text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        message = f"answered {response.status_code}" + (f" ({text})" if text else "")
        if response.status_code in _RETRIED_STATUSES:
            return _Retry(message, _seconds(response.headers.get("retry-after", "")))
        if response.status_code == 500:
            return _Retry(message, fault=True)
        raise Refused(response.status_code, f"{self._url}{path} {message}")

    def in_parallel(self, function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
        """Map ``function`` over items in order, ``workers`` at a time; an exception or Ctrl-C stops all."""
        pool = ThreadPoolExecutor(max_workers=max(1, min(workers, len(items))))
        try:
            return list(pool.map(function, items))
        except BaseException:
            self._stopped.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def require_address(url: str) -> None:
    """Raise ValueError for a URL that is not plainly http(s)://host/path.

    A URL ends up in the files of a run and in messages, and a password or a key must not.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        where = f"{parts.scheme}://{parts.hostname}"
        raise ValueError(f"the address of {where} holds a name, a password or a query: give keys by the environment")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server: give one such as http://127.0.0.1:8000")


def scores_or_nan(outcomes: Sequence[Outcome], scorer: str, strict: bool = False) -> Tensor:
    """Return the scores (B,), NaN for a sample without one, with a warning: the counts, and the first error's message.

    Raises RemoteError where all were refused or, if ``strict``, where one has no score.
    """
    errors = [outcome for outcome in outcomes if isinstance(outcome, SampleError)]
    if errors:
        counts = Counter(error.code for error in errors)
        reasons = ", ".join(f"{number} {code}" for code, number in counts.items())
        count = len(outcomes)
        message = f"{scorer} {count - len(errors)} of {count} samples ({reasons}): {errors[0].message}"
        if strict or counts["refused"] == count:
            raise RemoteError(message)
        logger.warning("%s; the others are NaN", message)
    return torch.tensor([torch.nan if isinstance(outcome, SampleError) else outcome for outcome in outcomes])


def _seconds(retry_after: str) -> float:
    """Read Retry-After, a number of seconds or a date (RFC 9110, 10.2.3), as seconds from now; 0 if unreadable."""
    with suppress(ValueError):
        return max(0.0, float(retry_after))
    with suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp())
    return 0.0
