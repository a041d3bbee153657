"""A step as a table: one row for every allocation and free, in order.

The first rows are what was alive when the step began (`event` is -1). Bytes are
signed: negative where they were freed. Summed down to any row they are what was
held there, of a category or in all; `allocated_bytes` is that sum, and the
allocator's own count. A prediction times nothing: its `time_us` counts events.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..events import Phase
from ..ledger import LiveBlock
from .blocks import BlockTexts, chunks
from .exported_run import ExportedRun, Format, Sink
from .number_text import text_rows

COLUMNS = (
    "run", "rank", "step", "event", "time_us", "allocated_bytes", "bytes", "slack_bytes", "category", "layer",
    "owner", "operator", "dtype", "shape", "phase", "micro_batch", "module", "stream", "pool",
)  # fmt: skip
"""`phase`, `micro_batch` and `module` are where the block was made; empty if that was before the step. `stream`
and `pool` are those of the caching allocator that it is cut from; empty where there is none."""


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """The rows of one run after those of another."""
    sink.write(_line(COLUMNS))
    for run in runs:
        _write_run(run, sink)


FORMAT = Format("csv", ".csv", "a table of every allocation and free, for a spreadsheet or pandas", write)


def _write_run(run: ExportedRun, sink: Sink) -> None:
    ledger, held = run.ledger, 0
    blocks, times = ledger.blocks, ledger.trace.events["time_us"]
    about = _line((run.name, run.run.id.rank, run.trace.step)).rstrip(b"\n") + b","
    texts = BlockTexts(ledger, _described)
    for part, events in chunks(ledger):
        sign = np.where(part.is_alloc, 1, -1)
        size, slack = blocks["bytes"][part.row], blocks["slack"][part.row]
        size, slack = sign * size, sign * slack
        allocated = held + np.cumsum(size + slack)
        held = int(allocated[-1])
        before = len(part.event) - events  # these come first and have no time
        heads = text_rows(b"%,,%,%,%,", *(column[:before] for column in (part.event, allocated, size, slack)))
        time = times[part.event[before:]]
        heads += text_rows(b"%,%,%,%,%,", part.event[before:], time, allocated[before:], size[before:], slack[before:])
        rows = [about + head + tail for head, tail in zip(heads, texts.of(part.row), strict=True)]
        sink.write(b"".join(rows), events)


def _described(block: LiveBlock, layer: str) -> bytes:
    shape = "x".join(map(str, block.shape))
    made = ("", "", "") if block.phase is Phase.IDLE else (block.phase.title, block.micro_batch, block.module)
    cut_from = (block.pool.stream, block.pool.name) if block.pool is not None else ("", "")
    return _line((block.category.key, layer, block.name, block.operator, block.dtype, shape, *made, *cut_from))


def _line(cells: Iterable[Any]) -> bytes:
    """A row as RFC 4180 has it, but for the line's end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
