"""Ctrl-C in every 0.05 s of every command's first ten seconds.

    python -m tests.benchmarks.interrupts [--tries 200 | --all] [--seed 0] [COMMAND ...]

A try starts the command on a terminal of its own, types Ctrl-C that long after
the program has been executed, and checks what must hold: exit code 130 (or the
command's own, if it was faster), no traceback, the terminal as it was, and a few
seconds later no process, socket or file of it. A Ctrl-C that finds Python itself
still starting, before the first line of the program, is told apart.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from gpumem_tui.engine.engine_registry import EngineLock
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.run_events import StepEnded

from ..app_driver import RECORDINGS
from ..conftest import small_run
from ..terminal import Terminal, until

EVERY_S, FIRST_S = 0.05, 10.0
ENDS_WITHIN_S, LEAVES_WITHIN_S = 5.0, 5.0
SMALL = ["--device", "cpu", "--batch-size", "2", "--seq-len", "16"]
RECORDING = str(RECORDINGS / "full.gpumem")
SLEEPER = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
ARGUMENTS: dict[str, list[str]] = {
    "": SMALL,
    "--once": ["--once", *SMALL],
    "--json": ["--json", *SMALL],
    "--jsonl": ["--jsonl", *SMALL],
    "attach": ["attach", "--take"],
    "exec": ["exec", "--", sys.executable, "-m", "tests.examples.plain_loop"],
    "ps": ["ps"],
    "stop": ["stop"],
    "run": ["run", "--steps", "1000000", *SMALL],
    "sweep": ["sweep", *SMALL],
    "estimate": ["estimate", "--profile", "qwen2.5-7b"],
    "advise": ["advise", "--profile", "gpt2"],
    "check": ["check", "--profile", "gpt2", "--budget", "24GiB"],
    "weights": ["weights", "--profile", "tiny"],
    "open": ["open", RECORDING],
    "why": ["why"],
    "export": ["export", RECORDING, "--format", "csv", "--output", "/dev/stdout"],
    "profiles": ["profiles"],
    "techniques": ["techniques"],
    "doctor": ["doctor"],
    "config": ["config", "set", "units=GB"],
    "warm": ["warm", "--for", "1s", "--profile", "tiny"],
    "completion": ["completion", "bash"],
}
"""By command, or by what is asked of the app."""
IN_PYTHONS_START = re.compile(r"<frozen (site|runpy|importlib)")
ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class Try:
    """One Ctrl-C, and what was wrong afterwards."""

    command: str
    delay_s: float
    took_s: float = 0.0
    over: bool = False
    before_the_program: bool = False
    wrong: tuple[str, ...] = ()


def interrupt(command: str, delay_s: float) -> Try:
    """Start a command, type Ctrl-C, and look at what is left."""
    with machine() as (home, environment), _company(command, environment) as others:
        terminal = Terminal(*ARGUMENTS[command], environment=environment | {"PYTHONPATH": ROOT}, folder=home)
        try:
            time.sleep(delay_s)
            began = time.monotonic()
            over = terminal.process.poll() is not None
            terminal.press("\x03")
            code = _wait(terminal)
            found = Try(command, delay_s, time.monotonic() - began, over)
            text = terminal.output.decode(errors="replace")
            found.before_the_program = bool(IN_PYTHONS_START.search(text)) and f"{ROOT}/tui/" not in text
            if not found.before_the_program:
                found.wrong = tuple(_wrong(command, code, over, text, terminal)) + tuple(_left(home, others))
            return found
        finally:
            terminal.close()


@contextmanager
def machine() -> Iterator[tuple[Path, dict[str, str]]]:
    """Folders of one's own, and the environment that has everything in them; what runs there is ended."""
    home = Path(tempfile.mkdtemp(prefix="g-"))
    names = {"XDG_RUNTIME_DIR": "run", "TMPDIR": "tmp", "XDG_CONFIG_HOME": "config", "XDG_STATE_HOME": "state"}
    for name in names.values():
        (home / name).mkdir()
    try:
        yield home, {variable: str(home / name) for variable, name in names.items()}
    finally:
        for process in _processes(home):
            process.kill()
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _company(command: str, environment: dict[str, str]) -> Iterator[set[int]]:
    """What a command needs: an engine, one that will not be stopped, a run that ran out of memory; their processes."""
    before = dict(os.environ)
    os.environ |= environment
    try:
        if command == "attach":
            viewer = JobSource(Launcher())
            viewer.start(small_run(steps=0))
            until(lambda: any(isinstance(m, StepEnded) for m in viewer.events(0)), lambda: viewer.events(0))
            info = viewer.engine_dir.info() if viewer.engine_dir else None
            assert info is not None
            yield {info.pid}
            viewer.close()
        elif command == "stop":
            code = f"from {EngineLock.__module__} import EngineLock; lock = EngineLock('x', 'run', 1, '0'); {SLEEPER}"
            with subprocess.Popen([sys.executable, "-c", code]) as sleeper:
                until(lambda: list((Path(environment["XDG_RUNTIME_DIR"])).rglob("card.json")))
                yield {sleeper.pid}
                sleeper.kill()
        elif command == "why":
            runs_out = [sys.executable, "-m", "gpumem_tui.tui", "run", "--memory-limit", "8MiB", *SMALL]
            subprocess.run(runs_out, capture_output=True, check=False)
            yield set()
        else:
            yield set()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _wait(terminal: Terminal) -> int | None:
    try:
        return terminal.process.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        return None


def _wrong(command: str, code: int | None, over: bool, text: str, terminal: Terminal) -> Iterator[str]:
    if code is None:
        yield f"still running {ENDS_WITHIN_S:g} s later"
        return
    # A script of the user's ends as it ends without us: by the signal, or by its KeyboardInterrupt.
    allowed = {130, -signal.SIGINT, 1} if command == "exec" else {130, -signal.SIGINT}
    if not over and code not in allowed | {0}:  # 0: it was over in the same instant
        yield f"exit code {code}"
    for words in ("Traceback", "terminate called", "Exception ignored", "core dumped"):
        if words in text and command != "exec":
            yield f"it says {words}: {text[-300:]!r}"
    if not terminal.sane(used=b"\x1b[?1049h" in terminal.output):
        yield "the terminal is not as it was"


def _left(home: Path, others: set[int]) -> Iterator[str]:
    deadline = time.monotonic() + LEAVES_WITHIN_S
    while (alive := [p for p in _processes(home) if p.pid not in others]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in alive:
        yield f"process left: {process.info}"
    folders = ("tmp", "config") if others else ("run", "tmp", "config")
    left = [path for folder in folders for path in (home / folder).rglob("*")]
    # torch makes a cache folder for its compiler, whoever imports it.
    ours = ("gpumem-tui", ".lock", "config.toml")
    yield from (f"file left: {path}" for path in left if path.name not in ours and "torchinductor" not in str(path))


def _processes(home: Path) -> list[psutil.Process]:
    """Those that live on this machine of ours."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        try:
            ours = process.pid != os.getpid() and process.environ().get("TMPDIR") == str(home / "tmp")
        except psutil.Error:
            continue
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("commands", nargs="*", metavar="COMMAND", help=f"of: {', '.join(ARGUMENTS)}")
    flags.add_argument("--tries", type=int, default=200)
    flags.add_argument("--all", action="store_true", help="every command at every delay")
    flags.add_argument("--seed", type=int, default=0)
    asked = flags.parse_args()
    delays = [i * EVERY_S for i in range(round(FIRST_S / EVERY_S))]
    grid = [(command, delay) for command in asked.commands or ARGUMENTS for delay in delays]
    if not asked.all:
        grid = random.Random(asked.seed).sample(grid, min(asked.tries, len(grid)))
    tries = []
    for command, delay in grid:
        tries.append(found := interrupt(command, delay))
        if found.wrong:
            print(f"{command or 'the app'} at {delay:.2f} s: {'; '.join(found.wrong)}", flush=True)
    failed = sum(bool(found.wrong) for found in tries)
    early, late = sum(found.before_the_program for found in tries), sum(found.over for found in tries)
    slowest = max((found.took_s for found in tries), default=0.0)
    print(
        f"{len(tries)} tried, {failed} failed; at most {slowest:.2f} s; {early} in Python's own start, {late} too late"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
