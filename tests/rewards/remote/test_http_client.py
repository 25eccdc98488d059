"""The client's retries end, whatever a server answers."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.remote import http_client
from rewards.remote.http_client import HttpClient, Patience, RemoteError, Unavailable

DATES = [f"Wed, 21 Oct {year} 07:28:00 {zone}" for year, zone in ((2015, "GMT"), (10**20, "GMT"), (2015, f"+{10**17}"))]
RETRY_AFTER = st.sampled_from(["", "0", "0.01", "-1", "nan", "inf", "1e400", "soon", *DATES])
ANSWERS = st.one_of(
    st.builds(
        lambda status, after, body: httpx.Response(status, headers={"Retry-After": after}, content=body),
        st.sampled_from([200, 204, 301, 400, 401, 404, 408, 413, 425, 429, 500, 502, 503, 504]),
        RETRY_AFTER,
        st.binary(max_size=20) | st.just(b'{"error": {"code": "x"}}'),
    ),
    st.sampled_from([httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadTimeout, httpx.RemoteProtocolError]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=6), st.sampled_from([0.0, 0.05, 900.0]))
def test_every_request_ends(answers: list[httpx.Response | type[httpx.TransportError]], startup: float) -> None:
    sent = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal sent
        sent += 1
        one = answers[(sent - 1) % len(answers)]
        if isinstance(one, httpx.Response):
            return httpx.Response(one.status_code, headers=one.headers, content=one.content)
        raise one("no luck")

    patience = Patience(deadline=0.1, startup=startup, first_pause=0.005, longest_pause=0.01)
    started = time.monotonic()
    with HttpClient("http://127.0.0.1:1", "NO_TOKEN", patience) as client:
        client._http = httpx.Client(transport=httpx.MockTransport(answer))
        try:
            assert isinstance(client.send("/x", b"{}"), bytes)
        except RemoteError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - started < 2 and sent <= 500


@given(
    st.sampled_from([field.name for field in fields(Patience)]),
    st.floats(max_value=-1e-9) | st.sampled_from([math.nan, math.inf, 1e10]),
)
def test_waits_without_end_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"patience.{name} must be a finite number of at least 0, not"):
        Patience(**{name: value})


@contextmanager
def dripping(start: bytes, drip: bytes) -> Iterator[str]:
    """A server that sends ``start``, and then ``drip`` again and again for up to 4 seconds; its address."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(start)
            for _ in range(80):
                connection.sendall(drip)
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        served.result()


@pytest.mark.parametrize(
    ("scheme", "start", "drip"),
    [
        ("http", b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
        ("http", b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("http", b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
        ("https", b"\x16\x03\x03\x40\x00", b"\x02"),  # a record of TLS of 16 KiB
    ],
    ids=["headers", "100 Continue", "body", "TLS handshake"],
)
def test_the_deadline_ends_an_answer_that_drips(scheme: str, start: bytes, drip: bytes) -> None:
    with (
        dripping(start, drip) as address,
        HttpClient(address.replace("http", scheme), "NO_TOKEN", Patience(deadline=0.5)) as client,
        pytest.raises(Unavailable, match="given up after"),
    ):
        started = time.monotonic()
        client.send("/x", b"{}")
    assert time.monotonic() - started < 2.5


def test_a_server_that_is_always_busy_is_given_up_after_the_retries() -> None:
    sent: list[httpx.Request] = []
    patience = Patience(deadline=60.0, retries=3, first_pause=0.01, longest_pause=0.01)
    with HttpClient("http://127.0.0.1:1", "NO_TOKEN", patience) as client:
        busy = httpx.MockTransport(lambda request: sent.append(request) or httpx.Response(503))
        client._http = httpx.Client(transport=busy)
        with pytest.raises(Unavailable, match="given up after 4 attempts"):
            client.send("/x", b"{}")
    assert len(sent) == 4


def test_an_answer_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_LARGEST_ANSWER", 100)
    with HttpClient("http://127.0.0.1:1", "NO_TOKEN", Patience(deadline=60.0)) as client:
        client._http = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=b"a" * 101)))
        with pytest.raises(RemoteError, match="answered with over 100 bytes"):
            client.send("/x", b"{}")
