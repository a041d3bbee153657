"""How soon the app names the best change: its seconds after the first step, on a terminal, with the real engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..terminal import Terminal
from ..vt import Screen

ROWS, COLUMNS = 30, 160
"""Room for the whole line."""
STEP = re.compile(r"^ *step +[1-9]", re.MULTILINE)
NAMED = re.compile(r"(?<!what )(?:saves most|try first)(?P<so_far>[^:]*): (?P<key>\S+) (?P<best>.*\S)")
LOOK_EVERY_S = 0.05
AT_MOST_S = 600.0
SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


class Named(NamedTuple):
    """Seconds from the end of the first step, of the wall; 0: it was named by then.

    Attributes:
        key_s: Until the technique that is the best in the end is named, whichever value of it.
        best_s: Until it and all that save more are named with the values of the end.
        all_s: Until all changes are known.
        best: What is named in the end.
    """

    key_s: float
    best_s: float
    all_s: float
    best: str


@contextmanager
def busy_cores(environment: Mapping[str, str]) -> Iterator[None]:
    """A process that spins on each core, in sessions of their own as other users' are."""
    command = [sys.executable, "-S", "-c", SPIN]
    spinning = [
        subprocess.Popen([*command, str(core)], env=environment, start_new_session=True)
        for core in os.sched_getaffinity(0)
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def named(environment: dict[str, str], folder: Path) -> Named:
    """Start the app with the profile `tiny` on the CPU and wait until it has tried all changes.

    Args:
        environment: With the code that is measured, and folders of its own.
        folder: To start it in.
    """
    terminal = Terminal("--profile", "tiny", "--device", "cpu", environment=environment, folder=folder, rows=ROWS)
    try:
        terminal.resize(ROWS, COLUMNS)
        return _read(terminal)
    finally:
        stop = [sys.executable, "-m", "gpumem_tui.tui", "stop"]
        subprocess.run(stop, env=environment, cwd=folder, stdout=subprocess.DEVNULL, check=False)
        terminal.close()


def _read(terminal: Terminal) -> Named:
    screen, taken = Screen(COLUMNS, ROWS), 0
    first_step_s, seen = None, list[tuple[float, str, str]]()
    began_s = time.monotonic()
    while (now_s := time.monotonic()) - began_s < AT_MOST_S:
        text, taken = terminal.output[taken:].decode(errors="ignore"), len(terminal.output)
        screen.feed(text)
        shown = "\n".join(screen.lines)
        if first_step_s is None and STEP.search(shown):
            first_step_s = now_s
        if found := NAMED.search(shown):
            if not seen or seen[-1][2] != found["best"]:
                seen.append((now_s, found["key"], found["best"]))
            if first_step_s is not None and "so far" not in found["so_far"]:
                _, key, best = seen[-1]
                since_s = [max(0.0, at_s - first_step_s) for at_s, *_ in seen]
                key_s = next(s for s, (_, one, _) in zip(since_s, seen, strict=True) if one == key)
                return Named(key_s, since_s[-1], max(0.0, now_s - first_step_s), best)
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"no change was named within {AT_MOST_S:.0f} s:\n" + "\n".join(screen.lines))
