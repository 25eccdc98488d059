"""Files that are whole or absent, and locks."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from genalign.runtime import files
from genalign.runtime.files import Claims, load_state, save_state, write_json
from genalign.runtime.state import load_optimizer_tensors, optimizer_tensors


def test_state_goes_round(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(1.5)}
    save_state(tmp_path / "deep" / "s.safetensors", tensors, {"step": 3})
    loaded, meta = load_state(tmp_path / "deep" / "s.safetensors")
    assert meta == {"step": 3} and torch.equal(loaded["a"], tensors["a"]) and torch.equal(loaded["b"], tensors["b"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_a_resumed_optimiser_goes_on_as_the_first(kind: type[torch.optim.Optimizer]) -> None:
    def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2, bias=False)
        return layer, kind(layer.parameters(), lr=0.1)

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, optimizer = fresh()
    step(first, optimizer)
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(resumed, {k: v.clone() for k, v in optimizer_tensors(optimizer).items()})
    step(first, optimizer)
    step(second, resumed)
    assert torch.equal(first.weight, second.weight)


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK])
def claims(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Claims:
    """Locks in a folder of a file system with locks, or of one without, which refuses them."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, "no locks here")

    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return Claims(tmp_path / "locks")


def test_a_piece_of_work_is_claimed_by_one(claims: Claims) -> None:
    with claims.try_claim(3) as first, Claims(claims.folder).try_claim(3) as second, claims.try_claim(4) as other:
        assert (first, second, other) == (True, False, True)
    with claims.try_claim(3) as again:
        assert again
    with pytest.raises(RuntimeError, match="my work failed"), claims.try_claim(3):
        raise RuntimeError("my work failed")
    with claims.try_claim(3) as again:
        assert again


def test_an_exclusive_lock_is_waited_for_and_given_up(
    claims: Claims, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_UNNOTICED", 0.05)
    held, order = threading.Event(), []

    def hold() -> None:
        with claims.exclusive():
            held.set()
            threading.Event().wait(0.3)
            order.append("first")

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with caplog.at_level("INFO", "genalign"), claims.exclusive():
        order.append("second")
    holder.join()
    assert order == ["first", "second"]
    assert f"waiting for another process, which holds {claims.folder / 'all'}" in caplog.text
    monkeypatch.setattr(files, "_LONGEST", 0.1)
    held.clear()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with (
        pytest.raises(TimeoutError, match=r"is held by another process, for 0\.1 s by now: end it"),
        claims.exclusive(),
    ):
        pass
    holder.join()


def test_a_killed_process_loses_its_locks(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from genalign.runtime.files import Claims\n"
        "with Claims(Path(sys.argv[1])).try_claim(0) as held: print(held); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "True\n" and done.returncode == -9
    with Claims(tmp_path).try_claim(0) as held:
        assert held
