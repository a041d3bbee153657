"""The screens without a terminal: `--once`, `--json`, `--jsonl`, and what happens when stdout is none.

`--once`: the live screen as text once a step is known, then the end.
`--json`: the same as one JSON document. `--jsonl`: one a refresh, for as long as the run goes on.
Otherwise, and no terminal: a line of plain text for everything the engine tells.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...engine.config import UserError
from ..units import clock
from .common import failure_code, json_line, json_text, without_keys

if TYPE_CHECKING:
    from ...engine.feed import Source
    from ..board import Board
    from ..settings import Settings
    from ..state import ViewState

SCHEMA = "gpumem-live/1"
WIDTH, HEIGHT = 100, 40
ENOUGH_STEPS = 2
"""The step from which on a run holds what it will hold."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The ways to do without the app."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--once", action="store_true", help="print the live screen once as text, and end")
    what.add_argument("--json", action="store_true", help="print what the live screen shows once as JSON, and end")
    what.add_argument("--jsonl", action="store_true", help="print that at every refresh, a line of JSON each")


def wanted(flags: argparse.Namespace) -> bool:
    """True if the app is not to be opened."""
    return bool(flags.once or flags.json or flags.jsonl or not sys.stdout.isatty())


def show(source: Source, flags: argparse.Namespace, settings: Settings, hz: float) -> int:
    """Print what was asked for; 0, or the exit code of the run's failure.

    Raises:
        UserError: The engine would not begin a run; nothing is printed of it.
    """
    from ..board import Board
    from ..palette import Palette

    palette = Palette(mono=True, ascii=bool(settings["ascii"]) or not prints_unicode())
    board = Board(source, settings, palette)
    lines = _stream(board, source, flags, hz)
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    failed = source.live and board.state.run.status == "failed"
    return failure_code(source.runs()) if failed else 0


def _stream(board: Board, source: Source, flags: argparse.Namespace, hz: float) -> Iterator[str]:
    from ...engine.run_events import to_plain
    from ..event_log import Filter

    state, told = board.state, -1
    while True:
        changed = state.update(source, time.monotonic())
        over = not source.live or _over(state)
        if over and source.live and not source.runs():
            raise UserError(without_keys(state.logs[Filter.NOTABLE][-1].text))
        if flags.once or flags.json:
            if over or (state.run.step >= ENOUGH_STEPS and state.peak is not None):
                yield json_text(frame(state)) if flags.json else text(board)
                return
        elif flags.jsonl:
            if changed or over:
                new = source.events(told + 1)
                told = new[-1].index if new else told
                yield json_line(frame(state) | {"events": to_plain(new)})
        else:
            for event in state.logs[Filter.NO_RECOMPUTES]:
                if event.index > told:
                    told = event.index
                    yield f"{clock(event.time_s):>8}  {event.words:<14} {event.text}"
        if over:
            if not (flags.once or flags.json or flags.jsonl):
                yield text(board)
            return
        time.sleep(1 / hz)


def _over(state: ViewState) -> bool:
    """True if nothing more will come: the run has ended, or was never begun."""
    from ...engine.run_events import EngineEnded, Refused, RunEnded
    from ..event_log import Filter

    log = state.logs[Filter.NOTABLE]
    ended = bool(log) and isinstance(log[-1], RunEnded | Refused | EngineEnded)
    return ended and not state.run.running


def text(board: Board) -> str:
    """The live screen, and of a job its ranks: plain text, no escape codes, no trailing blanks, no row of keys."""
    width = min(max(shutil.get_terminal_size((WIDTH, HEIGHT)).columns, 60), 200)
    lines = [row.text.rstrip() for row in board.rows(width, HEIGHT)]
    ranks = [row.text.rstrip() for row in board.ranks.whole(width)]
    return "\n".join(lines[:-2]).rstrip() + "".join(f"\n{line}" for line in ["", *ranks] * bool(ranks))


def frame(state: ViewState) -> dict[str, Any]:
    """The figures of the live screen, for programs; sizes in whole bytes, null if not known."""
    from ...engine.categories import Category

    run, gauge, peak = state.run, state.gauge, state.peak.peak if state.peak else None
    now = state.latest
    return {
        "schema": SCHEMA,
        "status": state.status,
        "model": state.config.model if state.config else None,
        "run": run.number,
        "rank": state.shown.id.rank if state.shown is not None else None,
        "ranks": [{"rank": one.id.rank, "peak_bytes": state.run_list.state_of(one).peak_bytes} for one in state.job],
        "step": run.step,
        "loss": run.loss,
        "lost_loss": run.lost_loss or None,
        "step_seconds": run.seconds,
        "tokens_per_second": run.tokens_per_s,
        "trace_share": run.trace_share,
        "device": None if gauge is None else {
            "time_s": gauge.time_s,
            "phase": gauge.phase.title,
            "allocated_bytes": gauge.allocated_bytes,
            "reserved_bytes": gauge.reserved_bytes,
            "managed_bytes": gauge.managed_bytes,
            "pinned_bytes": gauge.pinned_bytes,
            "process_bytes": gauge.process_bytes,
            "used_bytes": gauge.device_used_bytes,
            "total_bytes": gauge.device_total_bytes,
        },
        "now": None if now is None else {c.key: now[c] for c in Category},
        "peak": None if peak is None else {
            "step": peak.step,
            "phase": peak.phase.title,
            "module": peak.module,
            "allocated_bytes": peak.bytes,
            "by_category": {c.key: peak.by_category[c] for c in Category},
        },
    }  # fmt: skip


def prints_unicode() -> bool:
    """True if what reads us can have more than ASCII: a pipe gets what the locale says."""
    return "utf" in (sys.stdout.encoding or "").lower() and os.environ.get("TERM") != "linux"
