"""The program with the times of its ticks noted, for `tests.benchmarks.terminal`: `ticks FILE ARGUMENTS...`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.cli import main

if __name__ == "__main__":
    times: list[float] = []
    tick = GpumemApp.tick

    def noted(app: GpumemApp) -> None:
        times.append(time.monotonic())
        tick(app)

    GpumemApp.tick = noted  # type: ignore[method-assign, assignment]
    try:
        code = main(sys.argv[2:])
    finally:
        Path(sys.argv[1]).write_text(json.dumps(times))
    sys.exit(code)
