"""`gpumem-tui ps`: the engines that are running."""

from __future__ import annotations

import argparse
import sys

from ...engine import engine_registry
from ...engine.config import printable
from ...engine.remote import peek
from ..units import IN_MIB, clock


def add(parser: argparse.ArgumentParser) -> None:
    """No flags."""
    parser.set_defaults(command=main)


def main(_flags: argparse.Namespace) -> int:
    """Print a line an engine."""
    rows: list[tuple[str, ...]] = [
        ("NAME", "PID", "MODEL", "TECHNIQUES", "DEVICE", "STATE", "STEP", "MIB", "AGE", "VIEWERS")
    ]
    for engine_dir in engine_registry.engines():
        status, info = peek(engine_dir), engine_dir.info()
        if status is None:
            rows.append((engine_dir.name, str(info.pid if info else ""), "", "", "", "does not answer", "", "", "", ""))
            continue
        state = f"{status.state}, own script" if status.kind == "watch" else status.state
        rows.append((
            status.name, str(status.pid), status.model, status.techniques or "as by default", status.device, state,
            str(status.step), IN_MIB.show(status.allocated_bytes), clock(status.age_s), str(status.viewers),
        ))  # fmt: skip
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(rows) == 1:
        sys.stdout.write("no engine is running\n")
        return 0
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")
    return 0
