"""A step for https://ui.perfetto.dev: counters by category on one scale, phases, recomputes and modules as slices.

The trace is a protobuf of `TracePacket`s (perfetto/protos/perfetto/trace). A
step has a packet or two an event, all of one shape, so they are encoded by the
column: a number takes as many bytes as the largest, which protobuf allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..categories import Category
from ..events import Phase
from ..ledger import Ledger
from .exported_run import ExportedRun, Format, Sink

CHUNK = 1 << 16
SEQUENCE = 1
"""All packets are of one sequence."""
ALL = 1
"""The group of several runs."""

Ints = npt.NDArray[np.int64]


class Field:
    """Field numbers, as in perfetto's .proto files."""

    PACKET = 1
    TIMESTAMP, SEQUENCE_ID, TRACK_EVENT, TRACK_DESCRIPTOR = 8, 10, 11, 60
    UUID, NAME, PARENT_UUID, COUNTER, SIBLING_ORDER, CHILD_ORDERING = 1, 2, 5, 8, 12, 11
    UNIT, SHARE_KEY = 3, 7
    TYPE, TRACK_UUID, EVENT_NAME, COUNTER_VALUE = 9, 11, 23, 30


UNIT_SIZE_BYTES = 3
EXPLICIT = 3
"""Order of a track's children: by their rank."""
SLICE_BEGIN, SLICE_END, COUNTER = 1, 2, 4


class Slice(NamedTuple):
    """Something that goes on from one time to another."""

    name: str
    begin_us: int
    end_us: int


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """A group of tracks a run; the runs of a job on one clock, and each job's from its beginning."""
    began: dict[tuple[str, int], int] = {}
    for run in runs:
        began[_job(run)] = min(began.get(_job(run), _began_us(run)), _began_us(run))
    several = len(runs) > 1
    if several:
        sink.write(_group(ALL, "runs"))
    for number, run in enumerate(runs, 1):
        place = (ALL, number) if several else None
        sink.write(_group(100 * number, f"{run.name}, step {run.trace.step}", place))
        _write_tracks(run, 100 * number, began[_job(run)], sink)


FORMAT = Format("perfetto", ".perfetto-trace", "ui.perfetto.dev: counters by category, phases and recomputes", write)


# --- protobuf ---------------------------------------------------------------------------


def varint(number: int) -> bytes:
    """A number, seven bits a byte, lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def whole(field: int, number: int) -> bytes:
    """A field that is a number."""
    return varint(field << 3) + varint(number)


def part(field: int, content: bytes | str) -> bytes:
    """A field that is a text or a message."""
    data = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(data)) + data


def varints(column: Ints) -> npt.NDArray[np.uint8]:
    """Numbers from 0 on, each in as many bytes as the largest takes, shape [rows, bytes]."""
    width = len(varint(int(column.max(initial=0))))
    cells = np.empty((len(column), width), np.uint8)
    for at in range(width):
        cells[:, at] = column >> 7 * at & 0x7F | (0x80 if at < width - 1 else 0)
    return cells


def counters(time_ns: Ints, track: Ints, value: Ints) -> bytes:
    """Packets that each set a counter.

    Args:
        time_ns: When.
        track: Its track's uuid.
        value: Bytes from then on.
    """
    if not len(time_ns):
        return b""
    columns = (
        whole(Field.TYPE, COUNTER), varint(Field.TRACK_UUID << 3), varints(track),
        varint(Field.COUNTER_VALUE << 3), varints(value),
    )  # fmt: skip
    event = _laid_out(len(time_ns), columns)
    head = varint(Field.TRACK_EVENT << 3 | 2) + varint(event.shape[1])
    body = _laid_out(
        len(time_ns),
        (varint(Field.TIMESTAMP << 3), varints(time_ns), whole(Field.SEQUENCE_ID, SEQUENCE), head, event),
    )
    return _laid_out(len(time_ns), (varint(Field.PACKET << 3 | 2) + varint(body.shape[1]), body)).tobytes()


def _laid_out(rows: int, columns: Sequence[bytes | npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Columns side by side, bytes being the same in every row."""
    same = [np.broadcast_to(np.frombuffer(c, np.uint8), (rows, len(c))) if isinstance(c, bytes) else c for c in columns]
    return np.concatenate(same, axis=1)


# --- tracks -------------------------------------------------------------------------------


def _track(uuid: int, name: str, parent: int, rank: int, counter: bool = False) -> bytes:
    described = whole(Field.UUID, uuid) + part(Field.NAME, name) + whole(Field.PARENT_UUID, parent)
    described += whole(Field.SIBLING_ORDER, rank)
    if counter:  # of one scale with its siblings
        described += part(Field.COUNTER, whole(Field.UNIT, UNIT_SIZE_BYTES) + part(Field.SHARE_KEY, f"bytes {parent}"))
    return _packet(part(Field.TRACK_DESCRIPTOR, described))


def _group(uuid: int, name: str, place: tuple[int, int] | None = None) -> bytes:
    """A track with tracks in it, of a rank in another; no process, whose tracks the viewer sorts by name."""
    described = whole(Field.UUID, uuid) + part(Field.NAME, name) + whole(Field.CHILD_ORDERING, EXPLICIT)
    if place is not None:
        described += whole(Field.PARENT_UUID, place[0]) + whole(Field.SIBLING_ORDER, place[1])
    return _packet(part(Field.TRACK_DESCRIPTOR, described))


def _packet(content: bytes) -> bytes:
    return part(Field.PACKET, whole(Field.SEQUENCE_ID, SEQUENCE) + content)


def _slices(uuid: int, found: Sequence[Slice], began_us: int) -> bytes:
    """Packets of slices that are in order of time and do not overlap."""
    out = []
    for name, begin_us, end_us in found:
        begin = whole(Field.TYPE, SLICE_BEGIN) + whole(Field.TRACK_UUID, uuid) + part(Field.EVENT_NAME, name)
        end = whole(Field.TYPE, SLICE_END) + whole(Field.TRACK_UUID, uuid)
        out += [
            _packet(whole(Field.TIMESTAMP, (at - began_us) * 1000) + part(Field.TRACK_EVENT, event))
            for at, event in ((begin_us, begin), (end_us, end))
        ]
    return b"".join(out)


# --- a run --------------------------------------------------------------------------------


def _job(run: ExportedRun) -> tuple[str, int]:
    return run.run.id.engine, run.run.id.number


def _began_us(run: ExportedRun) -> int:
    """The first time that is known of its step."""
    trace = run.trace
    times = np.append(trace.events["time_us"], [span.begin_us for span in trace.phases])
    return int(times.min()) if len(times) else 0


def _write_tracks(run: ExportedRun, base: int, began_us: int, sink: Sink) -> None:
    """The tracks of a run, in the group of uuid `base`; theirs follow on it."""
    ledger, trace = run.ledger, run.trace
    shown = [c for c in Category if ledger.curve[c].any()]
    spans = [Slice(_title(s.phase, s.micro_batch), s.begin_us, s.end_us) for s in trace.phases]
    again = [s.phase is Phase.RECOMPUTE for s in trace.phases]
    lanes = {
        "phases": [span for span, inner in zip(spans, again, strict=True) if not inner],
        "recomputes": [span for span, inner in zip(spans, again, strict=True) if inner],
        "modules": _modules(ledger),
    }
    for rank, (name, found) in enumerate(lanes.items(), 1):
        if found:
            sink.write(_track(base + rank, name, base, rank) + _slices(base + rank, found, began_us))
    for rank, name in ((10, "allocated"), *((11 + c, c.info.title) for c in shown)):
        sink.write(_track(base + rank, name, base, rank, counter=True))
    for data, events in _counters(ledger, base + 10, began_us):
        sink.write(data, events)


def _title(phase: Phase, micro_batch: int) -> str:
    return f"{phase.title}, micro-batch {micro_batch}" if micro_batch else phase.title


def _modules(ledger: Ledger) -> list[Slice]:
    """The modules at work, from their first event to the next one's."""
    events, trace = ledger.trace.events, ledger.trace
    if not len(events):
        return []
    module = trace.marks["module"][events["mark"]]
    starts = np.flatnonzero(np.append(True, module[1:] != module[:-1]))
    times = events["time_us"][starts].tolist()
    ends = [*times[1:], int(events["time_us"][-1])]
    names = [trace.names[i] for i in module[starts].tolist()]
    return [Slice(*row) for row in zip(names, times, ends, strict=True) if row[0]]


def _counters(ledger: Ledger, track: int, began_us: int) -> Iterator[tuple[bytes, int]]:
    """Every change of a category and of the total, the categories first, with how many events each piece is.

    Args:
        ledger: The step, folded.
        track: Of the total; a category's is as many on, and one more.
        began_us: When the clock begins.
    """
    curve, total = ledger.curve, ledger.total
    times = ledger.trace.events["time_us"] - began_us
    for start in range(0, len(total), CHUNK):
        columns = np.arange(start, min(start + CHUNK, len(total)))
        before = np.maximum(columns - 1, 0)
        changed = curve[:, columns] != curve[:, before]
        if not start:
            changed[:, 0] = curve.any(axis=1)  # where each begins
        place, category = np.nonzero(changed.T)
        rows = np.concatenate([columns[place], columns])
        tracks = np.concatenate([track + 1 + category, np.full(len(columns), track)])
        values = np.concatenate([curve[category, columns[place]], total[columns]])
        order = np.argsort(rows, kind="stable")
        at = np.maximum(rows[order] - 1, 0)
        when = times[at] if len(times) else np.zeros_like(at)
        yield counters(when * 1000, tracks[order], values[order]), len(columns)
