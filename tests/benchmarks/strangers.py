"""Other people's loops (`tests/examples/strangers.py`), watched at a real size: what of their memory has no owner.

    python -m tests.benchmarks.strangers [--only preferences,images] [--steps 5] [--small]

On a GPU at real size, on a CPU tiny. Prints, of the traced steps of each loop, the peak, the
most unknown and the most held by the script; fails where anything is unknown or more than 1 % is held.
"""

from __future__ import annotations

import argparse
import gc
import sys

import torch

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.watch.leftovers import name_leftovers
from gpumem_tui.engine.watch.watched_source import WatchedSource

from ..examples import strangers

LIMIT = 0.01


def main() -> int:
    """Print a line a loop."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--only", default="")
    flags.add_argument("--steps", type=int, default=5)
    flags.add_argument("--small", action="store_true")
    chosen = flags.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    traces: list[StepTrace] = []
    publish = WatchedSource.publish

    def keep(source: WatchedSource, trace: StepTrace) -> None:
        traces.append(trace)
        publish(source, trace)

    WatchedSource.publish = keep  # type: ignore[method-assign, assignment]
    failed = 0
    for loop in strangers.LOOPS:
        if chosen.only and loop.__name__ not in chosen.only.split(","):
            continue
        traces.clear()
        try:
            loop(chosen.steps, device, device == "cuda" and not chosen.small)
        except ImportError as error:
            print(f"{loop.__name__:26} not run: {error}")
            continue
        failed += _told(loop.__name__, [Ledger(name_leftovers(trace)) for trace in traces if trace.is_complete])
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return int(failed > 0)


def _told(name: str, ledgers: list[Ledger]) -> bool:
    """Print a loop's line; whether anything has no owner that should have one."""
    if not ledgers:
        print(f"{name:26} no step was traced")
        return True
    peak = max(ledger.peak.bytes for ledger in ledgers)
    unknown, held = (
        max(int(ledger.curve[category].max()) for ledger in ledgers)
        for category in (Category.UNKNOWN, Category.HELD_BY_SCRIPT)
    )
    mismatch = max(ledger.mismatch_bytes for ledger in ledgers)
    print(
        f"{name:26} {len(ledgers)} steps, peak {peak / 2**20:9.1f} MiB, unknown {unknown} B, "
        f"held by script {held / 2**20:.2f} MiB ({100 * held / peak:.2f} %), mismatch {mismatch} B"
    )
    return unknown > 0 or held > LIMIT * peak or mismatch > 0


if __name__ == "__main__":
    sys.exit(main())
