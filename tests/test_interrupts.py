"""Ctrl-C ends every command at once and in order; what dies at its start leaves no engine; a hang-up is an end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from gpumem_tui.engine import engine_registry
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.tui.cli import COMMANDS
from gpumem_tui.tui.hang_up import HUNG_UP

from .app_driver import RECORDINGS
from .benchmarks.interrupts import ARGUMENTS, FIRST_S, SMALL, interrupt, machine
from .conftest import small_run
from .terminal import Terminal, until

LASTING = ["", "--once", "attach", "exec", "run", "sweep", "estimate", "advise", "open"]
SHARE = random.Random(0)
TRIES = [
    # An engine was left; it hung for 40 s; the process aborted; it took until the model was loaded.
    *[("", 1.0), ("--jsonl", 2.0), ("doctor", 1.2), ("run", 3.0)],
    *[(SHARE.choice(LASTING), round(SHARE.uniform(0.5, FIRST_S / 3), 2)) for _ in range(3)],
]


@pytest.mark.parametrize(("command", "delay_s"), TRIES)
def test_ctrl_c_ends_a_command_in_order(command: str, delay_s: float) -> None:
    assert interrupt(command, delay_s).wrong == ()


def test_every_command_is_interrupted_by_the_benchmark() -> None:
    assert {name for name, _, _ in COMMANDS} <= set(ARGUMENTS)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "from gpumem_tui.tui import interrupt; interrupt.install(); signal.raise_signal(signal.SIGINT)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_app_that_dies_at_its_start_takes_its_engine_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it did with a Textual that did not know the app's theme."""
    with machine() as (home, environment):
        (home / "sitecustomize.py").write_text(
            "import importlib.abc, sys\n"
            "class Broken(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name == 'gpumem_tui.tui.screens.live': raise ValueError('a broken app')\n"
            "sys.meta_path.insert(0, Broken())\n"
        )
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        terminal = Terminal(*SMALL, environment=environment | {"PYTHONPATH": str(home)}, folder=home)
        assert terminal.wait() == 1
        assert b"a broken app" in terminal.output
        terminal.close()
        until(lambda: engine_registry.engines() == [])


def test_an_app_that_is_killed_at_its_start_takes_its_engine_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine() as (home, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        terminal = Terminal(*SMALL, environment=environment, folder=home)
        (engine,) = until(lambda: psutil.Process(terminal.process.pid).children())
        assert b"\x1b[?1049h" not in terminal.output, "it is not seen yet"
        terminal.process.send_signal(signal.SIGKILL)
        engine.wait(60)
        terminal.close()
        until(lambda: engine_registry.engines() == [])


def test_a_terminal_that_vanishes_is_the_end_though_sighup_is_ignored(tmp_path: Path) -> None:
    recording = str(RECORDINGS / "full.gpumem")
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    terminal = Terminal("open", recording, environment=environment, folder=tmp_path, ignored=[signal.SIGHUP])
    terminal.sees("parameters")
    os.close(terminal.master)
    assert terminal.wait() == HUNG_UP
    terminal.close()


def test_a_source_whose_start_was_interrupted_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as the thread that launches the engine is being started: it never runs, and is not to be waited for."""

    def interrupted(_thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    source = JobSource(Launcher())
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.start(small_run())
    source.close()
