"""What an attached app costs the training: step times with it at 10 Hz over step times without.

    python -m tests.benchmarks.attached [--profile tiny] [--rounds 6] [--steps 30]

One engine trains all the while; the app is attached and detached in turn, in a
terminal that is drawn on. Each stretch of steps with it is set against the mean
of the stretches without before and after, so that a machine that gets slower or
faster weighs on both sides alike. Speed with the app over speed without: 1.00
means that it costs nothing. A stretch while the app comes up (it loads the
libraries that predict) counts for itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from gpumem_tui.engine import techniques, whereabouts
from gpumem_tui.engine.events import Kind
from gpumem_tui.engine.feed import End
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.remote import Remote, peek
from gpumem_tui.tui.commands.app import LOCAL_HZ

from ..terminal import Terminal, until

SKIPPED = 2
"""Steps at the beginning of a stretch that are not counted: they had begun before."""

COMING_UP_S = 20.0
STRETCHES = 3
"""With the app, in a round."""


def stretch(viewer: Remote, steps: int) -> float:
    """Seconds of the median step among the next so many."""
    begin = told(viewer)[-1].index if told(viewer) else -1
    until(lambda: sum(m.index > begin for m in told(viewer)) >= steps + SKIPPED, seconds=600)
    seconds = [m.data["seconds"] for m in told(viewer) if m.index > begin][SKIPPED : SKIPPED + steps]
    return statistics.median(seconds)


def told(viewer: Remote) -> list:  # type: ignore[type-arg]
    return [m for m in viewer.milestones(0) if m.kind is Kind.STEP_ENDED]


def main() -> int:
    """Print the ratio; 0 if it is at least 0.99."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--profile", default="tiny")
    flags.add_argument("--rounds", type=int, default=6)
    flags.add_argument("--steps", type=int, default=30)
    flags.add_argument("--set", action="append", default=[], help="key=value")
    chosen = flags.parse_args()
    home = Path(tempfile.mkdtemp(prefix="g-"))
    (home / "run").mkdir()
    environment = {"XDG_RUNTIME_DIR": str(home / "run")}
    os.environ |= environment
    typed = dict(item.split("=", 1) for item in chosen.set)
    config = techniques.configure({"model": chosen.profile}, techniques.parse(typed, "--set"))
    # It learns of the steps afterwards: milestones keep, so it need not ask while they are measured.
    viewer = Remote(launch=Launcher(), ask_every_s=2.0)
    viewer.start(config)
    alone: list[float] = []
    settled: list[float] = []
    coming_up: list[float] = []
    ratios: list[float] = []
    try:
        until(lambda: len(told(viewer)) > 10, lambda: viewer.milestones(0), seconds=600)
        alone.append(stretch(viewer, chosen.steps))
        for _ in range(chosen.rounds):
            attached_s = time.monotonic()
            app = Terminal("attach", "--hz", f"{LOCAL_HZ:g}", environment=environment, folder=home)
            app.sees("read-only")
            coming_up.append(stretch(viewer, chosen.steps))
            threading.Event().wait(max(0.0, attached_s + COMING_UP_S - time.monotonic()))
            drawn = len(app.output)
            with_it = [stretch(viewer, chosen.steps) for _ in range(STRETCHES)]
            assert len(app.output) > drawn
            app.press("q")
            app.wait()
            app.close()
            alone.append(stretch(viewer, chosen.steps))
            settled += with_it
            ratios += [(alone[-2] + alone[-1]) / 2 / seconds for seconds in with_it]
        status = peek(whereabouts.engines()[0])
        where = status.device if status else "?"
    finally:
        viewer.command(End())
        viewer.wait_ended(60)
        viewer.close()
        shutil.rmtree(home, ignore_errors=True)
    ratio = statistics.median(ratios)
    without, starting = statistics.median(alone), statistics.median(coming_up)
    print(f"{chosen.profile} {' '.join(chosen.set)} on {where}: step {without * 1e3:.1f} ms alone,")
    print(
        f"{statistics.median(settled) * 1e3:.1f} ms with the app at {LOCAL_HZ:g} Hz, {starting * 1e3:.1f} ms coming up;"
    )
    print(
        f"speed with over without: {ratio:.3f} (median of {len(ratios)} stretches), {without / starting:.3f} coming up"
    )
    print("stretches: " + " ".join(f"{r:.3f}" for r in sorted(ratios)))
    return int(ratio < 0.99)


if __name__ == "__main__":
    sys.exit(main())
