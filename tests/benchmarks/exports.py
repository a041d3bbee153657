"""How long does a step of a million events take in each format, and how much memory?

    python -m tests.benchmarks.exports [--events N] [FORMAT ...]

The step is synthetic, like the 1.3B model's repeated, and every block is rounded
up as CUDA's allocator does. Each format is written to a file in a process of
its own: seconds of the fold and of the writing and of both on a core, the
file's size, and what the process held at most beyond the folded step.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpumem_tui.engine import techniques
from gpumem_tui.engine.exports import export, registry
from gpumem_tui.engine.exports.exported_run import ExportedRun
from gpumem_tui.engine.run import Run, RunId

from ..fake_source import GPU
from .fold import synthetic
from .snapshot import most_kib

MIB = 1 << 20
ROUNDING = 512
"""Bytes that CUDA's allocator hands out at least, and in multiples of."""


def measured(name: str, events: int) -> str:
    """One format, in this process."""
    run = Run(RunId("synthetic", 1), techniques.configure({"model": "tiny"}, {}), GPU)
    trace = synthetic(events)
    columns = trace.events.copy()
    columns["time_us"] = range(1_700_000_000_000_000, 1_700_000_000_000_000 + 40 * len(columns), 40)
    asked = columns["bytes"]
    rounded = -np.abs(asked) % ROUNDING
    columns["slack"] = np.where(asked < 0, -rounded, rounded)
    run.keep([dataclasses.replace(trace, events=columns)])
    exported = ExportedRun(run, "synthetic")
    began, began_cpu = time.perf_counter(), time.process_time()
    _ = exported.ledger.curve
    folded = time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the fold's own most does not count
    held, spent = most_kib(), time.process_time() - began_cpu
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        begun, begun_cpu = time.perf_counter(), time.process_time()
        export([exported], registry()[name], path)
        seconds, spent = time.perf_counter() - begun, spent + time.process_time() - begun_cpu
        size = path.stat().st_size
    beyond = most_kib() - held
    return (
        f"{name:<12} fold {folded - began:5.2f} s  write {seconds:5.2f} s  both {spent:5.2f} s of CPU"
        f"  {size / MIB:8.1f} MiB  +{beyond * 1024 / MIB:6.0f} MiB held"
    )


def main() -> int:
    """Print a line a format."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("formats", nargs="*", metavar="FORMAT")
    flags.add_argument("--events", type=int, default=1_000_000)
    flags.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = flags.parse_args()
    for name in chosen.formats or registry():
        if chosen.here:
            print(measured(name, chosen.events))
        else:
            command = [sys.executable, "-m", "tests.benchmarks.exports", "--here", "--events", str(chosen.events), name]
            subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
