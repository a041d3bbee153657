"""A share of the attacks, the same every time; the rest: `python -m tests.benchmarks.attacks`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpumem_tui.engine.run_events import RunFailed, StepEnded

from .benchmarks.attacks import Tally, lines, recordings, sockets, toml
from .benchmarks.attacks.__main__ import watched_script
from .conftest import small_run
from .serving import an_engine_served


def test_messages_to_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with an_engine_served(small_run(steps=3)) as (engine_dir, engine):
        assert sockets.attack(engine_dir, seed=1, count=250) == Tally(250)
        told = engine.run_events(small_run(steps=1))
    assert isinstance([m for m in told if isinstance(m, StepEnded | RunFailed)][-1], StepEnded)


def test_messages_to_a_watched_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with watched_script() as (engine_dir, proof):
        assert sockets.attack(engine_dir, seed=2, count=100) == Tally(100)
    assert proof == Tally(1)


@pytest.mark.parametrize(("attack", "count"), [(toml.attack, 400), (recordings.attack, 60), (lines.attack, 6)])
def test_files_and_command_lines(attack: Callable[[Path, int, int], Tally], count: int, tmp_path: Path) -> None:
    assert attack(tmp_path, 3, count) == Tally(count)
