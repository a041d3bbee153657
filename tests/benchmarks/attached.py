"""What an attached app costs the training: step times with it at 10 Hz over step times without.

    python -m tests.benchmarks.attached [--profile tiny] [--pairs 20] [--set KEY=VALUE]

One engine trains all the while. The app is attached in a terminal that is drawn
on; once it has come up it is stopped and let go on in turn, every few seconds
(a stopped viewer asks for nothing), so that a machine that gets slower or
faster weighs on both sides alike. Speed with the app over speed without: 1.00
means that it costs nothing. Its coming up, in which the libraries that predict
are loaded in a process of their own, is set against the steps before it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from gpumem_tui.engine import engine_registry, techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.feed import End
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.remote import peek
from gpumem_tui.engine.run_events import StepEnded
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.settings import LOCAL_HZ

from ..terminal import Terminal, until

WINDOW_S = 3.0
MARGIN_S = 0.4
"""At the beginning of a window nothing is counted: the engine's clock is known to a tenth of a second."""

COMING_UP_S = 20.0


class Engine:
    """An engine that trains without end, seen by a viewer that seldom asks."""

    def __init__(self, config: RunConfig) -> None:
        self.viewer = JobSource(Launcher(), ask_every_s=0.5)
        self.viewer.start(config)
        self._offsets_s: list[float] = []

    def steps(self) -> list[StepEnded]:
        """All that were told of so far."""
        gauge = self.viewer.gauge()
        if gauge is not None:
            self._offsets_s.append(time.monotonic() - gauge.time_s)
        return [m for m in self.viewer.events(0) if isinstance(m, StepEnded)]

    def during(self, window: tuple[float, float]) -> list[float]:
        """Seconds of the steps that lie within a window of the monotonic clock."""
        begin_s, end_s = (at - min(self._offsets_s) for at in window)
        steps = ((m.time_s, m.seconds) for m in self.steps() if m.seconds is not None)
        return [seconds for end, seconds in steps if begin_s <= end - seconds and end <= end_s]

    def wait(self, seconds: float) -> tuple[float, float]:
        """Let it train; returns the window without its margin."""
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            self.steps()
            threading.Event().wait(0.1)
        return begin + MARGIN_S, time.monotonic()


def main() -> int:
    """Print the ratio; 0 if it is at least 0.99."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--profile", default="tiny")
    flags.add_argument("--pairs", type=int, default=20)
    flags.add_argument("--set", action="append", default=[], help="key=value")
    chosen = flags.parse_args()
    home = Path(tempfile.mkdtemp(prefix="g-"))
    (home / "run").mkdir()
    environment = {"XDG_RUNTIME_DIR": str(home / "run")}
    os.environ |= environment
    typed = dict(item.split("=", 1) for item in chosen.set)
    engine = Engine(techniques.configure(run_fields(chosen.profile), techniques.parse(typed, "--set")))
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    try:
        until(lambda: len(engine.steps()) > 10, lambda: engine.viewer.events(0), seconds=600)
        before = engine.wait(COMING_UP_S / 2)
        app = Terminal("attach", "--hz", f"{LOCAL_HZ:g}", environment=environment, folder=home)
        coming_up = engine.wait(COMING_UP_S)
        app.sees("read-only")
        for _ in range(chosen.pairs):
            drawn = len(app.output)
            with_it = engine.wait(WINDOW_S)
            assert len(app.output) > drawn
            app.process.send_signal(signal.SIGSTOP)
            pairs.append((with_it, engine.wait(WINDOW_S)))
            app.process.send_signal(signal.SIGCONT)
        app.press("q")
        app.wait()
        app.close()
        status = peek(engine_registry.engines()[0])
        where = status.device if status else "?"
        engine.wait(1.0)
    finally:
        engine.viewer.command(End())
        engine.viewer.wait_ended(60)
        engine.viewer.close()
        shutil.rmtree(home, ignore_errors=True)
    timed = [(engine.during(with_it), engine.during(without)) for with_it, without in pairs]
    timed = [pair for pair in timed if all(pair)]  # a window may have no whole step in it
    watched, alone = ([statistics.fmean(pair[side]) for pair in timed] for side in (0, 1))
    ratios = [a / b for a, b in zip(alone, watched, strict=True)]
    ratio, error = statistics.fmean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    started = statistics.fmean(engine.during(before)) / statistics.fmean(engine.during(coming_up))
    print(f"{chosen.profile} {' '.join(chosen.set)} on {where}: step {statistics.fmean(alone) * 1e3:.1f} ms alone,")
    print(f"{statistics.fmean(watched) * 1e3:.1f} ms with the app at {LOCAL_HZ:g} Hz")
    print(f"speed with over without: {ratio:.3f} +- {error:.3f} ({len(ratios)} pairs of windows of {WINDOW_S:g} s)")
    print(f"while the app comes up, for {COMING_UP_S:g} s: {started:.3f}")
    return int(ratio < 0.99)


if __name__ == "__main__":
    sys.exit(main())
