"""The client's retries end, whatever a server answers."""

from __future__ import annotations

import time

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.remote.http_client import HttpClient, Patience, RemoteError

RETRY_AFTER = st.sampled_from(["", "0", "0.01", "-1", "nan", "inf", "1e400", "soon", "Wed, 21 Oct 2015 07:28:00 GMT"])
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

    patience = Patience(deadline=0.2, startup=startup, first_pause=0.01, longest_pause=0.02)
    started = time.monotonic()
    with HttpClient("http://127.0.0.1:1", "NO_TOKEN", patience) as client:
        client._http = httpx.Client(transport=httpx.MockTransport(answer))
        try:
            assert isinstance(client.send("/x", b"{}"), bytes)
        except RemoteError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - started < 2 and sent <= 500
