"""The client's retries end, whatever a server answers."""

from __future__ import annotations

import math
import time
from dataclasses import fields

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.remote.http_client import HttpClient, Patience, RemoteError

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

    patience = Patience(deadline=0.2, startup=startup, first_pause=0.01, longest_pause=0.02)
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
