"""Commands of genalign that benches would run."""

from __future__ import annotations

import pytest

from tests.packages import ROOT


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that the benches of learned rewards ask for, which are not run, with the settings' files."""
    from scripts.benchmarks import learned_rewards

    asked_for: list[tuple[str, ...]] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(learned_rewards, "run_genalign", lambda *arguments: asked_for.append(arguments))
    return asked_for
