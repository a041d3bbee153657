"""How fast is the fold, and does a long run stay small?

    python -m tests.benchmarks.fold [--steps N]

Events a second of `Ledger` on one core (pairing, naming, curve, peak), on a
synthetic step like the 1.3B model's repeated to a million events; then a soak:
N synthetic steps through a `Feed`, with the process's memory at ten points.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import psutil

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import BLOCK, EVENT, MARK, OWNER, Phase, StepTrace
from gpumem_tui.engine.feed import Feed
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.run_events import StepEnded


def synthetic(events: int, seed: int = 0) -> StepTrace:
    """Allocs in forward, frees in backward and in between, addresses used again and again."""
    rng = np.random.default_rng(seed)
    n = events // 2
    address = rng.permutation(n).astype(np.uint64) + 1
    sizes = rng.integers(512, 1 << 24, n)
    kept = rng.random(n) < 0.3
    rows = np.zeros(2 * n, EVENT)
    # Two in three live for an instant; the others are freed in backward, last made first freed.
    order = np.concatenate([np.arange(n) * 2, np.where(kept, 4 * n - np.arange(n), np.arange(n) * 2 + 1)])
    position = np.argsort(np.argsort(order, kind="stable"), kind="stable")
    rows["pool"] = -1
    rows["address"][position] = np.concatenate([address, address])
    rows["bytes"][position] = np.concatenate([sizes, -sizes])
    marks = np.zeros(1000, MARK)
    marks["phase"] = np.where(np.arange(1000) < 500, Phase.FORWARD, Phase.BACKWARD)
    marks["module"] = np.arange(1000) % 290
    rows["mark"] = np.linspace(0, 999, 2 * n).astype(np.int64)
    begin = np.array([(10**12 + i, 1 << 20, 0, -1) for i in range(300)], BLOCK)
    owners = np.array([(10**12 + i, 0, Category.PARAMETERS, i % 290, -1) for i in range(300)], OWNER)
    names = tuple(f"model.layers.{i // 12}.part{i % 12}" for i in range(290))
    return StepTrace(1, rows, marks, begin, owners, names, ())


def main() -> int:
    """Print both figures."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--steps", type=int, default=100_000)
    steps = flags.parse_args().steps
    for events in (6_000, 1_000_000):
        trace = synthetic(events)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            _ = Ledger(trace).peak
            seconds.append(time.perf_counter() - began)
        print(
            f"fold of {events:>9,} events: {min(seconds) * 1e3:8.1f} ms, {events / min(seconds) / 1e6:.2f} M events/s"
        )
    feed, process = Feed(), psutil.Process()
    trace = synthetic(6_000)
    for step in range(1, steps + 1):
        copied = StepTrace(step, trace.events.copy(), trace.marks, trace.begin, trace.owners, trace.names, ())
        feed.publish_trace(copied)
        feed.tell(StepEnded(text=f"step {step}", step=step, loss=1.0, seconds=0.1))
        if step % max(1, steps // 10) == 0:
            resident, kept = process.memory_info().rss / 2**20, len(feed.events(0))
            print(f"after {step:>7,} steps: {resident:7.1f} MiB, {kept:,} events")
    return 0


if __name__ == "__main__":
    sys.exit(main())
