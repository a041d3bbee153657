"""Faults, and what is left of the run, the terminal and the machine afterwards.

    python -m tests.benchmarks.faults [--trials 240]

Every trial does one of these to a real engine with a real viewer (on a pty
where a terminal is part of it), and checks what must hold: the terminal is as
it was, no process and no file is left, every step that was told is in what can
be saved. Prints a line a fault: trials, failures, seconds until the viewer knew.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from gpumem_tui.engine import engine_registry
from gpumem_tui.engine.engine_registry import EngineDir
from gpumem_tui.engine.feed import End, Save, ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.remote import peek
from gpumem_tui.engine.run_events import EngineEnded, Refused, StepEnded

from ..conftest import small_run
from ..terminal import Terminal, until
from ..viewing import gone

JOB_ENDS_WITHIN_S = 5.0


class Bench:
    """One machine of its own, and an engine that trials share until one kills it."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="g-"))
        for name in ("run", "tmp", "full"):
            (self.home / name).mkdir()
        self.environment = {"XDG_RUNTIME_DIR": str(self.home / "run"), "TMPDIR": str(self.home / "tmp")}
        os.environ |= self.environment
        self.random = random.Random(4)
        self._viewer: JobSource | None = None

    def viewer(self) -> JobSource:
        """One that commands an engine which trains."""
        if self._viewer is None or self._viewer.role is ViewerRole.GONE:
            self._viewer = viewer = JobSource(Launcher())
            viewer.start(small_run(steps=0))
            until(lambda: steps(viewer) >= 2, lambda: viewer.events(0))
        return self._viewer

    def job(self) -> JobSource:
        """One that commands two ranks that train."""
        job = JobSource(Launcher())
        job.start(small_run(steps=0, parallel="ddp").with_({"parallel.ranks": 2}))
        until(lambda: len(job.runs()) == 2 and steps(job) >= 2, lambda: job.events(0))
        return job

    @property
    def engine_dir(self) -> EngineDir:
        engine_dir = self.viewer().engine_dir
        assert engine_dir is not None
        return engine_dir

    def pid(self) -> int:
        return pid_of(self.engine_dir)

    def terminal(self) -> Terminal:
        """The app, attached to an engine that trains."""
        self.viewer()
        made = Terminal("attach", environment=self.environment, folder=self.home)
        made.sees("tiny")
        return made

    def goes_on(self) -> None:
        """The engine trains and answers."""
        viewer = self.viewer()
        now = steps(viewer)
        until(lambda: steps(viewer) > now, lambda: viewer.events(0)[-3:])

    def whole(self) -> None:
        """What the viewer saw can be saved, with every step that was told, the engine alive or not."""
        viewer = self._viewer
        assert viewer is not None
        path = self.home / f"{self.random.random()}.gpumem"
        viewer.command(Save(path))
        until(path.exists)
        told = [m.step for m in Recording(path).events(0) if isinstance(m, StepEnded)]
        assert told and told == list(range(1, len(told) + 1)), told
        path.unlink()

    def nothing_left(self) -> None:
        """No engine of ours that nobody knows of, no file but the living one's."""
        alive = [engine_dir.name for engine_dir in engine_registry.engines()]
        folders = [path.name for path in (self.home / "run" / "gpumem-tui").iterdir() if path.name != ".lock"]
        assert folders == alive, (folders, alive)
        left = [path.name for path in (self.home / "tmp").iterdir() if not path.name.startswith("torchinductor")]
        assert left == [], left


def leave(terminal: Terminal) -> None:
    """Quit the app; the terminal is as it was."""
    terminal.press("q")
    code = terminal.wait()
    assert code == 0, (code, terminal.output[-600:])
    assert terminal.sane(), terminal.output[-600:]
    terminal.close()


def steps(viewer: JobSource) -> int:
    return sum(isinstance(m, StepEnded) for m in viewer.events(0))


def engine_killed(bench: Bench) -> float:
    """kill -9 of the engine, the app attached: it says so, saves, and quits with the terminal as it was."""
    viewer, terminal, pid = bench.viewer(), bench.terminal(), bench.pid()
    for old in bench.home.glob("*.gpumem"):
        old.unlink()
    seen = steps(viewer)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    until(lambda: viewer.role is ViewerRole.GONE)
    known = time.monotonic() - began
    terminal.sees("gone")
    terminal.press("s")
    (saved,) = until(lambda: list(bench.home.glob("*.gpumem")), lambda: terminal.output[-600:])
    # The app asks ten times a second: of the last tenth it may know less than this viewer.
    told = [m.step for m in Recording(saved).events(0) if isinstance(m, StepEnded)]
    assert told and told == list(range(1, len(told) + 1)), told
    assert steps(viewer) >= seen, (steps(viewer), seen)
    bench.whole()
    saved.unlink()
    leave(terminal)
    engine_registry.clean()
    return known


def rank_killed(bench: Bench) -> float:
    """kill -9 of a rank: the job ends, says which it was, and all that was seen can be saved."""
    job = bench.job()
    number = bench.random.randrange(len(job.members))
    pid = pid_of(job.members[number].engine_dir)
    known = _ends(bench, job, pid)
    said = next(event.text for event in job.events(0) if isinstance(event, EngineEnded))
    assert said.startswith(f"rank {number}, process {pid}: killed by SIGKILL"), said
    return known


def launcher_killed(bench: Bench) -> float:
    """kill -9 of what has started the ranks: they end with it."""
    job = bench.job()
    return _ends(bench, job, os_parent(pid_of(job.members[0].engine_dir)))


def _ends(bench: Bench, job: JobSource, pid: int) -> float:
    """Kill a process of a job; all of it has to be gone in time."""
    ranks = [pid_of(member.engine_dir) for member in job.members]
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    until(lambda: all(map(gone, ranks)))
    assert (took := time.monotonic() - began) < JOB_ENDS_WITHIN_S, f"{took:.1f} s"
    until(lambda: job.role is ViewerRole.GONE)
    known = time.monotonic() - began
    path = bench.home / "job.gpumem"
    job.command(Save(path))
    until(path.exists)
    runs = Recording(path).runs()
    assert [run.id.rank for run in runs] == [1, 0], runs
    path.unlink()
    job.close()
    engine_registry.clean()
    return known


def pid_of(engine_dir: EngineDir) -> int:
    info = engine_dir.info()
    assert info is not None
    return info.pid


def os_parent(pid: int) -> int:
    parent: int = psutil.Process(pid).ppid()
    return parent


def app_killed(bench: Bench) -> float:
    """kill -9 of an app: the run goes on, nothing of it stays."""
    terminal = bench.terminal()
    before = viewers(bench.engine_dir)
    began = time.monotonic()
    terminal.close()
    until(lambda: viewers(bench.engine_dir) < before)
    known = time.monotonic() - began
    bench.goes_on()
    bench.whole()
    return known


def viewer_stopped(bench: Bench) -> float:
    """SIGSTOP of a viewer: the engine and the others do not notice; it catches up when it goes on."""
    terminal = bench.terminal()
    bench.goes_on()
    terminal.process.send_signal(signal.SIGSTOP)
    for _ in range(3):
        bench.goes_on()
    began = time.monotonic()
    terminal.process.send_signal(signal.SIGCONT)
    drawn = len(terminal.output)
    until(lambda: len(terminal.output) > drawn, lambda: terminal.output[-600:])
    known = time.monotonic() - began
    leave(terminal)
    return known


def random_bytes(bench: Bench) -> float:
    """Random bytes on the socket, at once and after a hello."""
    return _send(bench, bench.random.randbytes(bench.random.randrange(1, 5000)))


def giant_length(bench: Bench) -> float:
    """A message that claims up to 4 GiB."""
    return _send(bench, struct.pack("!I", bench.random.randrange(1 << 19, 1 << 32)) + b"x" * 100)


def _send(bench: Bench, data: bytes) -> float:
    engine_dir, began = bench.engine_dir, time.monotonic()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(engine_dir.socket))
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass
    known = time.monotonic() - began
    bench.goes_on()
    return known


def resize_storm(bench: Bench) -> float:
    """Two hundred sizes in a row while it draws."""
    terminal = bench.terminal()
    began = time.monotonic()
    for _ in range(200):
        terminal.resize(bench.random.randrange(1, 70), bench.random.randrange(1, 250))
    terminal.resize(24, 80)
    drawn = len(terminal.output)
    until(lambda: len(terminal.output) > drawn, lambda: terminal.output[-600:])
    known = time.monotonic() - began
    bench.goes_on()
    leave(terminal)
    return known


def disk_full(bench: Bench) -> float:
    """Saving where there is no room: said in one line, no half of a file, and elsewhere it can be saved."""
    viewer, full = bench.viewer(), bench.home / "full"
    before = sum(isinstance(m, Refused) for m in viewer.events(0))
    began = time.monotonic()
    viewer.command(Save(full / "run.gpumem"))
    until(lambda: sum(isinstance(m, Refused) for m in viewer.events(0)) > before)
    known = time.monotonic() - began
    assert list(full.iterdir()) == []
    bench.goes_on()
    bench.whole()
    return known


def viewers(engine_dir: EngineDir) -> int:
    status = peek(engine_dir)
    return status.viewers if status is not None else 0


FAULTS: dict[Callable[[Bench], float], int] = {
    engine_killed: 1, rank_killed: 1, launcher_killed: 1, app_killed: 2, viewer_stopped: 2, random_bytes: 5,
    giant_length: 5, resize_storm: 1, disk_full: 2,
}  # fmt: skip
"""How often each comes in a round of 20."""


def main() -> int:
    """Print the table; 0 if nothing failed."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--trials", type=int, default=240)
    rounds = -(-flags.parse_args().trials // sum(FAULTS.values()))
    bench = Bench()
    # A file system without room, in memory; the root may mount one, others get a folder that takes nothing.
    mounted = os.system(f"mount -t tmpfs -o size=4k tmpfs {bench.home / 'full'} 2>/dev/null") == 0
    if not mounted:
        (bench.home / "full").chmod(0o500)
    took: dict[str, list[float]] = {fault.__name__: [] for fault in FAULTS}
    failed: dict[str, int] = dict.fromkeys(took, 0)
    try:
        for _ in range(rounds):
            trials = [fault for fault, times in FAULTS.items() for _ in range(times)]
            bench.random.shuffle(trials)
            for fault in trials:
                try:
                    took[fault.__name__].append(fault(bench))
                    bench.nothing_left()
                except Exception as error:
                    failed[fault.__name__] += 1
                    print(f"{fault.__name__}: {str(error)[:500]}", flush=True)
        last = bench.viewer()
        last.command(End())
        assert last.wait_ended(30)
        bench.nothing_left()
    finally:
        for engine_dir in engine_registry.engines():  # after a failure of ours
            os.kill(info.pid if (info := engine_dir.info()) else 0, signal.SIGKILL)
        if mounted:
            os.system(f"umount {bench.home / 'full'}")
        shutil.rmtree(bench.home, ignore_errors=True)
    print(f"{'fault':<18}{'trials':>8}{'failed':>8}{'median s':>10}{'worst s':>10}")
    for name, seconds in took.items():
        tried, middle = len(seconds) + failed[name], statistics.median(seconds or [0.0])
        print(f"{name:<18}{tried:>8}{failed[name]:>8}{middle:>10.3f}{max(seconds, default=0.0):>10.3f}")
    print(f"{sum(map(len, took.values())) + sum(failed.values())} trials, {sum(failed.values())} failed")
    return min(sum(failed.values()), 1)


if __name__ == "__main__":
    sys.exit(main())
