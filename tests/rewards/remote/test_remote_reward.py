"""RemoteReward against real servers on loopback that are slow, busy, broken, poisoned, restarted or absent."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.scoring import protocol
from genalign.scoring.server import placeholder
from genalign.types import Prompt
from rewards.remote.http_client import Patience, RemoteError, Unavailable, Unreachable, _seconds
from rewards.remote.remote_reward import RemoteReward
from tests.http_servers import INFO, Answer, Faults, Seen, forwarded, free_port, serving, stub
from tests.rewards.gray_images import grays, named, plain

QUICK = Patience(deadline=20, timeout=5, first_pause=0.01, longest_pause=0.05)
POISON = 200


@dataclass
class Gray:
    """The mean of an image; it raises for a batch with an image of level POISON, and counts what it scored."""

    delay: float = 0.0
    batches: list[int] = field(default_factory=list)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        time.sleep(self.delay)
        levels = samples.flatten(1).mean(1)
        if bool(((levels * 255).round() == POISON).any()):
            raise RuntimeError("secret of the server")
        self.batches.append(len(samples))
        return levels

    @property
    def scored(self) -> int:
        return sum(self.batches)


def images(*levels: int) -> Tensor:
    return grays(*(level / 255 for level in levels))


def score(url: str, *levels: int, **settings: Any) -> list[float]:
    """Score gray images of these levels, and return the scores as levels."""
    reward = RemoteReward(url, **{"patience": QUICK, "batch_size": 4, **settings})
    return plain(255 * reward(images(*levels), named(len(levels))))


def test_remote_scores_are_local_scores_in_order() -> None:
    levels, reward = list(range(0, 190, 3)), Gray()
    with serving(reward) as url:
        samples, prompts = torch.rand(30, 3, 16, 12).mul(255).round().div(255), named(30)
        remote = RemoteReward(url, patience=QUICK, batch_size=4)(samples, prompts)
        torch.testing.assert_close(remote, Gray()(samples, prompts), atol=1e-6, rtol=0)
        assert score(url, *levels) == levels
    assert reward.scored == 30 + len(levels)


def test_prompts_and_metadata_travel() -> None:
    def indexed(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert all(prompt.text == f"gray {(prompt.metadata or {})['index']}" for prompt in prompts)
        return torch.tensor([float((prompt.metadata or {})["index"]) for prompt in prompts])

    with serving(indexed) as url:
        assert RemoteReward(url, patience=QUICK, batch_size=3)(images(*range(10)), named(10)).tolist() == list(
            range(10)
        )
        reward = RemoteReward(url, patience=QUICK)
        with pytest.raises(ValueError, match="metadata of prompt 'x' cannot travel as JSON"):
            reward(images(1), [Prompt("x", {"tensor": torch.zeros(1)})])


def test_waveforms_travel_without_loss() -> None:
    waves = torch.randn(5, 2, 400)
    with serving(lambda samples, prompts: samples[:, 1, 7], replace(INFO, sample_rate=16000)) as url:
        reward = RemoteReward(url, patience=QUICK, batch_size=2)
        assert torch.equal(reward(waves, named(5)), waves[:, 1, 7])
        with pytest.raises(RemoteError, match=r"scores audio, not image samples of shape \(1, 3, 4, 4\)"):
            reward(images(1), named(1))


def test_a_poison_item_costs_its_own_score_alone(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Gray()) as url:
        assert score(url, 1, 2, POISON, 4, 5, 6, 7, 8, POISON) == [1, 2, -1, 4, 5, 6, 7, 8, -1]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "rewards.remote.http_client"]
    message = "scored 7 of 9 samples (2 reward_failed): the reward raised RuntimeError: see the server's log"
    assert message in warning and "secret" not in warning


def test_a_poison_item_that_breaks_the_server_costs_its_own_score_alone() -> None:
    poison = base64.b64encode(protocol.encode_image(images(77)[0]))
    with (
        serving(Gray()) as url,
        stub(lambda seen: Answer(500) if poison in seen.body else forwarded(seen, url)) as broken,
    ):
        assert score(broken, 1, 2, 3, 77, 5, 6, 7) == [1, 2, 3, -1, 5, 6, 7]


def test_what_is_not_finite_does_not_travel() -> None:
    reward = Gray()
    with serving(reward) as url:
        samples = images(1, 2, 3).clone()
        samples[1, 0, 0, 0] = torch.nan
        assert plain(255 * RemoteReward(url, patience=QUICK)(samples, named(3))) == [1, -1, 3]
    assert reward.scored == 2


@pytest.mark.parametrize("fault", [Answer(408), Answer(429), Answer(500), Answer(502), Answer(503), Answer(drop=True)])
def test_passing_failures_are_retried(fault: Answer) -> None:
    with serving(Gray()) as url:
        faults = Faults(url, [fault, None, fault, fault])
        with stub(faults) as faulty:
            assert score(faulty, *range(10), concurrency=1) == list(range(10))
    assert len(faults.seen) == 6


def test_a_busy_server_that_scores_now_and_then_is_not_given_up() -> None:
    with serving(Gray()) as url, stub(Faults(url, [Answer(429), None] * 8)) as busy:
        patience = replace(QUICK, retries=1)
        assert score(busy, *range(8), batch_size=1, concurrency=1, patience=patience) == list(range(8))


def test_retry_after_is_waited_for() -> None:
    with serving(Gray()) as url:
        faults = Faults(url, [Answer(429, headers={"Retry-After": "1"})])
        with stub(faults) as faulty:
            assert score(faulty, 9) == [9]
    assert faults.times[1] - faults.times[0] >= 1.0
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and _seconds("soon") == 0.0
    assert 50 < _seconds(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60


def test_an_answer_that_was_lost_is_not_scored_twice() -> None:
    reward = Gray()
    with serving(reward) as url:
        faults = Faults(url, [Answer(drop=True), Answer(503)], answered_first=True)
        with stub(faults) as faulty:
            assert score(faulty, 1, 2, 3) == [1, 2, 3]
    assert reward.scored == 3 and len(faults.seen) == 3
    assert len({seen.body for seen in faults.seen}) == 1


def test_a_slow_server_gets_another_request_and_scores_once() -> None:
    reward = Gray(delay=0.7)
    with serving(reward) as url:
        assert score(url, 1, 2, 3, patience=replace(QUICK, timeout=0.25)) == [1, 2, 3]
    assert reward.scored == 3


def test_a_server_that_is_too_slow_gives_nan_by_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Gray(delay=1.0)) as url:
        assert score(url, 1, 2, patience=replace(QUICK, deadline=0.6, timeout=0.25)) == [-1, -1]
    assert "scored 0 of 2 samples (2 unavailable)" in caplog.text


def test_a_server_that_is_gone_costs_the_scores_that_were_missing() -> None:
    with serving(Gray()) as url:
        faults = Faults(url, [None, None, *[Answer(drop=True)] * 10_000])
        with stub(faults) as faulty:
            reward = RemoteReward(faulty, patience=replace(QUICK, deadline=1.5), batch_size=1, concurrency=1)
            assert plain(255 * reward(images(*range(1, 7)), named(6))) == [1, 2, -1, -1, -1, -1]
            faults.script.clear()
            assert plain(255 * reward(images(*range(1, 7)), named(6))) == [1, 2, 3, 4, 5, 6]


def test_no_server_is_an_error_within_seconds_that_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    url, started = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(
        Unreachable, match=rf"{url} cannot be reached \(ConnectError.*: correct the address, start its se"
    ):
        score(url, 1, patience=replace(QUICK, deadline=900, startup=0.5))
    assert time.monotonic() - started < 5
    (waiting,) = [record.getMessage() for record in caplog.records if record.name == "rewards.remote.http_client"]
    assert waiting.startswith(f"waiting for {url}, for up to 0.5 s: it cannot be reached (ConnectError")


def test_the_default_patience_gives_up_a_wrong_address_within_seconds() -> None:
    assert Patience().startup <= 5 and Patience().connect <= 5


def test_a_server_that_starts_late_is_waited_for_on_request() -> None:
    port, scores = free_port(), []
    patience = replace(QUICK, startup=20)
    client = threading.Thread(target=lambda: scores.extend(score(f"http://127.0.0.1:{port}", 1, 2, patience=patience)))
    client.start()
    time.sleep(0.5)
    with serving(Gray(), port=port):
        client.join()
    assert scores == [1, 2]


def test_a_server_that_answered_once_is_waited_for_although_it_is_gone() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving(Gray(), port=port):
        assert score(url, 1) == [1]
    with pytest.raises(Unavailable, match=r"given up after \d+ attempts of at most 0.6 s"):
        score(url, 1, patience=replace(QUICK, startup=0.0, deadline=0.6))


def test_a_server_that_is_still_loading_is_waited_for() -> None:
    reward = Gray(delay=0.5)
    with serving(reward, first=placeholder(INFO)) as url:
        assert score(url, 1, 2, 3) == [1, 2, 3]
    assert reward.batches == [1, 3]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>hello</html>", "this is not"),
        (b'{"schema": 2}', "this is not"),
        (b'{"schema": 2, "name": "x", "version": "1", "max_batch": 0}', "this is not"),
        (replace(INFO, schema=3).to_json(), "this side speaks schema 2, the other 3"),
    ],
)
def test_another_service_or_schema_is_an_error(body: bytes, message: str) -> None:
    with stub(lambda seen: Answer(200, body)) as url, pytest.raises(RemoteError, match=message):
        score(url, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"scores",
        b'{"schema": 2, "request_id": "x", "scores": [1.0], "errors": [null]}',
        b'{"schema": 2, "request_id": "ID", "scores": [NaN], "errors": [null], "version": "1", "seconds": 0}',
        b'{"schema": 2, "request_id": "ID", "scores": [true], "errors": [null], "version": "1", "seconds": 0}',
        b'{"schema": 2, "request_id": "ID", "scores": [1.0, 2.0], "errors": [null, null], "version": "1"}',
    ],
)
def test_a_reply_that_cannot_be_trusted_is_an_error(body: bytes) -> None:
    def answer(seen: Seen) -> Answer:
        if seen.method == "GET":
            return Answer(200, INFO.to_json())
        request_id = protocol.unpack_request(seen.body).request_id
        return Answer(200, body.replace(b"ID", request_id.encode()))

    with stub(answer) as url, pytest.raises(RemoteError, match=r"JSON|reply"):
        score(url, 1)


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Gray(), token="right") as url:
        for wrong in ("", "wrong", "right2"):
            monkeypatch.setenv("GENALIGN_TOKEN", wrong)
            with pytest.raises(RemoteError, match=r"answered 401 \(token: this server needs its bearer tok") as raised:
                score(url, 1)
            assert "right2" not in str(raised.value)
        monkeypatch.setenv("OTHER", "right")
        assert score(url, 1, token_variable="OTHER") == [1]


def test_large_batches_are_split_and_an_oversize_sample_is_nan(caplog: pytest.LogCaptureFixture) -> None:
    noisy = torch.rand(6, 3, 64, 64)  # about 12 kB each, which PNG cannot shrink
    noisy[2] = 0.5
    small = replace(INFO, max_bytes=30_000)
    with serving(Gray(), small) as url:
        faults = Faults(url)
        with stub(faults) as counted:
            assert not bool(RemoteReward(counted, patience=QUICK)(noisy, named(6)).isnan().any())
        assert len(faults.seen) >= 3 and all(len(seen.body) <= 30_000 for seen in faults.seen)
    with serving(Gray(), replace(INFO, max_bytes=8_000)) as url:
        scores = RemoteReward(url, patience=QUICK)(noisy, named(6))
        assert scores.isnan().tolist() == [True, True, False, True, True, True]
    assert "(5 too_large)" in caplog.text
    with serving(Gray(), replace(INFO, max_pixels=15)) as url:
        assert score(url, 1) == [-1]


def test_a_proxy_with_a_smaller_limit_gets_smaller_requests() -> None:
    with (
        serving(Gray()) as url,
        stub(lambda seen: Answer(413) if len(seen.body) > 900 else forwarded(seen, url)) as proxy,
    ):
        assert score(proxy, *range(8), batch_size=8) == list(range(8))


def test_a_restart_in_the_middle_of_a_round_loses_nothing() -> None:
    port, reward = free_port(), Gray(delay=0.05)
    remote = RemoteReward(f"http://127.0.0.1:{port}", patience=QUICK, batch_size=2, concurrency=3)
    levels, scores = list(range(40)), []
    with serving(reward, port=port):
        client = threading.Thread(target=lambda: scores.extend(plain(255 * remote(images(*levels), named(40)))))
        client.start()
        while not reward.batches:
            time.sleep(0.01)
    assert reward.scored < 40
    time.sleep(0.2)
    with serving(reward, port=port):
        client.join()
    assert scores == levels


def test_a_restart_as_another_version_is_not_mixed_in() -> None:
    port = free_port()
    remote = RemoteReward(f"http://127.0.0.1:{port}", patience=QUICK)
    with serving(Gray(), port=port):
        assert plain(255 * remote(images(1), named(1))) == [1]
    with serving(Gray(), replace(INFO, version="2"), port=port):
        with pytest.raises(RemoteError, match="was version 1 and is now 2: their scores must not be mixed"):
            remote(images(2), named(1))
        with pytest.raises(RemoteError, match=r"serves grey 2, but this reward needs version 1"):
            score(f"http://127.0.0.1:{port}", 1, version="1")


def test_samples_in_the_cache_are_not_sent_again() -> None:
    reward = Gray()
    with serving(reward) as url:
        remote = RemoteReward(url, patience=QUICK, cache=3)
        first = remote(images(1, 2, 3), named(3))
        assert torch.equal(remote(images(1, 2, 3), named(3)), first) and reward.scored == 3
        remote(images(1), [Prompt("another")])
        assert reward.scored == 4
        remote(images(1), named(1))  # the oldest was forgotten
        assert reward.scored == 5
        uncached = RemoteReward(url, patience=QUICK, cache=0)
        uncached(images(9), named(1))
        uncached(images(9), named(1))
    assert reward.scored == 7


def test_failures_can_be_errors() -> None:
    with serving(Gray()) as url, pytest.raises(RemoteError, match="scored 1 of 2 samples"):
        score(url, 1, POISON, failures="raise")


def test_wrong_shapes_are_refused() -> None:
    reward = RemoteReward("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="one prompt per sample, not 1 for 2"):
        reward(images(1, 2), named(1))
    with pytest.raises(ValueError, match="match no medium"):
        reward(torch.zeros(2, 5), named(2))
