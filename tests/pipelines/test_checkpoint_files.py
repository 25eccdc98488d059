"""The Hub, which may be out of reach."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from genalign.runtime.hub import hub_answers
from pipelines.checkpoint_files import model_index
from tests.http_servers import free_port


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget answers of the Hub, and unset proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


def test_a_hub_that_cannot_be_reached_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"not in the local cache, and the Hub did not give it"):
        model_index("nobody-at-all/no-such-model")
    assert time.monotonic() - began < 10  # the Hub's client would have tried again for longer
    assert caplog.text == ""


def test_a_hub_that_listens_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert hub_answers()


def test_offline_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers()


def test_behind_a_proxy_the_client_is_left_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub_answers()
