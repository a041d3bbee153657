"""A recording: Runs in a file. One `.gpumem` file is a zip of JSON and columns.

    gpumem.json                     version and, for each run, its head: identity, kind, configuration,
                                    environment, gauge, events, number of traces
    runs/<r>/<t>.json               step, how it ended, names, phases of a trace
    runs/<r>/<t>/<column>.npy       events, marks, begin, owners, made, segments

Nothing in it is ever unpickled. A recording is a `Source` like any other.
Versions 1 and 2 held one run and are read as well; up to 3 there were two categories less, and up to 4
no pools of the allocator's.
"""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from . import techniques
from .archive import Archive, regular_file
from .atomic_file import replacing
from .categories import Category
from .config import UserError, one_line, printable
from .events import (
    COMPLETE,
    OWNER,
    AllocatorPool,
    Counted,
    Ending,
    Environment,
    Gauge,
    Made,
    PhaseSpan,
    StepTrace,
    Whole,
)
from .feed import Command, Save, ViewerRole, Work
from .run import EventLog, Run, RunId, RunKind
from .run_events import Note, Refused, RunEvent, Saved, from_plain, placed, to_plain
from .trace_check import COLUMNS, check

VERSION = 5

SNAPSHOT_BEGINS = (b"\x80", b"{", b"[")
"""A pickle's first byte, and JSON's."""
ZIP_BEGINS = b"P"
CATEGORIES_BEFORE_4 = np.array(
    [c for c in Category if c not in (Category.GATHERED, Category.COMMUNICATION)], dtype=OWNER["category"]
)
"""Today's number of each category by the number it had up to version 3."""
ADDED = ("made", "segments")
"""Columns that recordings have from version 2 and from version 5 on."""
PIECE = 1 << 20
"""Bytes that are packed before it is asked whether to go on."""


class TraceHead(msgspec.Struct):
    """A `StepTrace` without its columns; fields as there."""

    step: Whole
    names: tuple[str, ...]
    phases: tuple[PhaseSpan, ...]
    micro_batches: Whole = 1
    counted: Counted | None = None
    descriptions: tuple[Made, ...] = ()
    ending: Ending = COMPLETE
    pools: tuple[AllocatorPool, ...] = ()


class RunHead(msgspec.Struct):
    """A `Run` without its traces.

    Attributes:
        id: Its identity.
        kind: How it comes to be.
        config: As `RunConfig.as_dict`.
        environment: Where.
        gauge: The last reading from within a training step.
        events: Of the run, in order.
        traces: How many there are.
    """

    id: RunId
    kind: RunKind
    config: dict[str, Any]
    environment: Environment
    gauge: Gauge | None = None
    events: list[dict[str, Any]] = []
    traces: Whole = 0


def head_of(trace: StepTrace) -> TraceHead:
    """The head that stands beside a trace's columns."""
    return TraceHead(**{name: getattr(trace, name) for name in TraceHead.__struct_fields__})


def trace_of(head: TraceHead, columns: Mapping[str, Any]) -> StepTrace:
    """The inverse of `head_of`.

    Args:
        head: Of the trace.
        columns: By name.

    Raises:
        ValueError: A column is of another layout, or something in it leads nowhere.
    """
    trace = StepTrace(**{name: getattr(head, name) for name in TraceHead.__struct_fields__}, **columns)
    check(trace)
    return trace


# --- writing --------------------------------------------------------------------------


def save(command: Save, runs: Sequence[Run]) -> RunEvent:
    """Write a recording or an export as asked, and tell what came of it: saved, cancelled, or why it could not be.

    Args:
        command: Where to, and which run.
        runs: All that there are; the last one is saved if the command names none. A rank's is saved with
            those of the others.
    """
    path, work = command.path, command.work
    try:
        chosen = of_all_ranks(command.run or (runs[-1] if runs else None), runs)
        if command.format and chosen:
            from .exports import export, format_named
            from .exports.exported_run import named

            export(named(chosen), format_named(command.format), path, work)
        else:
            write(path, chosen, work)
    except (OSError, UserError) as error:
        text = f"{path}: not saved: {one_line(error)}"
        return Note(text=text, path=str(path)) if work.cancelled else Refused(text=text, path=str(path))
    finally:
        work.over = True
    return Saved(text=f"saved {path}", path=str(path))


def of_all_ranks(chosen: Run | None, runs: Sequence[Run]) -> list[Run]:
    """A run with those that the other ranks of its job have of it, rank 0 last."""
    if chosen is None:
        return []
    others = [run for run in runs if run.id[:2] == chosen.id[:2] and run.id.rank != chosen.id.rank]
    return sorted([*others, chosen], key=lambda run: -run.id.rank)


def write(path: Path, runs: Sequence[Run], work: Work | None = None) -> None:
    """Save runs, atomically: the file is there whole or not at all.

    Args:
        path: Where; missing folders are made.
        runs: What.
        work: Told how far it is; asked whether to go on.

    Raises:
        OSError: It cannot be written there.
        UserError: There is nothing to save yet, or it was cancelled.
    """
    if not runs:
        raise UserError("no run has started yet")
    work = work or Work()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        _write_runs(archive, runs, work)


def _write_runs(archive: zipfile.ZipFile, runs: Sequence[Run], work: Work) -> None:
    traces = [list(run.traces()) for run in runs]
    heads = [
        RunHead(
            id=run.id,
            kind=run.kind,
            config=run.config.as_dict(),
            environment=run.environment,
            gauge=run.training_gauge or run.gauge,
            events=to_plain(run.events()),
            traces=len(kept),
        )
        for run, kept in zip(runs, traces, strict=True)
    ]
    archive.writestr("gpumem.json", msgspec.json.encode({"version": VERSION, "runs": heads}))
    whole = sum(getattr(trace, column).nbytes for kept in traces for trace in kept for column in COLUMNS)
    for r, kept in enumerate(traces):
        for t, trace in enumerate(kept):
            _write_trace(archive, f"runs/{r}/{t}", trace, work, whole)


def _write_trace(archive: zipfile.ZipFile, where: str, trace: StepTrace, work: Work, whole: int) -> None:
    archive.writestr(f"{where}.json", msgspec.json.encode(head_of(trace)))
    for column in COLUMNS:
        buffer = io.BytesIO()
        np.save(buffer, getattr(trace, column), allow_pickle=False)
        with archive.open(f"{where}/{column}.npy", "w") as packed:
            for start in range(0, buffer.getbuffer().nbytes, PIECE):
                if work.cancelled:
                    raise UserError("cancelled")
                packed.write(buffer.getbuffer()[start : start + PIECE])
        work.share += getattr(trace, column).nbytes / max(whole, 1)


# --- reading --------------------------------------------------------------------------


class Recording:
    """A recording, or several opened together, as a `Source`.

    Args:
        paths: `.gpumem` files and snapshots of PyTorch's, in the order in which their runs are listed.
        work: Told how far reading is.

    Raises:
        UserError: One is not there, or not a recording this version can read.
    """

    live = False
    role = ViewerRole.OWNER
    gone = False

    def __init__(self, *paths: Path, work: Work | None = None) -> None:
        stems = [path.stem for path in paths]
        names = stems if len({*stems}) == len({*paths}) else [str(path.with_suffix("")) for path in paths]
        self._runs = [run for path, name in zip(paths, names, strict=True) for run in read(path, name, work)]
        self._told = EventLog()
        self._next_index = 0

    @property
    def run(self) -> Run | None:
        """The last run."""
        return self._runs[-1] if self._runs else None

    def environment(self) -> Environment | None:
        """The environment of the first run recorded."""
        return self._runs[0].environment if self._runs else None

    def gauge(self) -> Gauge | None:
        """The last reading of the last one."""
        return self._runs[-1].gauge if self._runs else None

    def runs(self) -> Sequence[Run]:
        """All runs that were saved."""
        return self._runs

    def events(self, since: int = 0) -> Sequence[RunEvent]:
        """The events that answer commands; a run's own are its `Run.events`."""
        return self._told.since(since)

    def command(self, command: Command) -> None:
        """Save a run; there is nobody to do anything else.

        Raises:
            UserError: What is recorded has happened.
        """
        if not isinstance(command, Save):
            raise UserError(f"this is a recording: there is no engine to {type(command).__name__.lower()}")
        threading.Thread(target=self._save, args=(command,), name="save", daemon=True).start()

    def _save(self, command: Save) -> None:
        event = save(command, self._runs)
        self._told.append(placed(event, self._next_index, 0.0, 0))
        self._next_index += 1


def read(path: Path, name: str = "", work: Work | None = None) -> list[Run]:
    """The runs of a recording, or of a snapshot of PyTorch's.

    Args:
        path: A `.gpumem` file, or a snapshot as pickle or JSON.
        name: What the runs' engine is called; the file's name if empty.
        work: Told how far reading a snapshot is.

    Raises:
        UserError: It is not there, or not a recording this version can read.
    """
    try:
        with regular_file(path) as file:
            first = file.read(1)
            if first in SNAPSHOT_BEGINS:
                from .snapshot.runs import runs_of

                return runs_of(path, name, work)
            return _runs(Archive(file), name or path.stem)
    except OSError as error:
        raise UserError(printable(f"{path}: {error.strerror or error}")) from None
    except UserError as error:
        text = str(error)
        raise UserError(printable(text if text.startswith(str(path)) else f"{path}: {text}")) from None
    except zipfile.BadZipFile:
        none = "neither a gpumem recording nor a snapshot of PyTorch's"
        problem = "a gpumem recording that is cut off or damaged" if first == ZIP_BEGINS else none
        raise UserError(printable(f"{path}: {problem}")) from None
    except Exception as error:  # NumPy and msgspec raise what they like at bytes that are none of ours
        problem = f"{path}: not a gpumem recording, or a damaged one ({one_line(error)})"
        raise UserError(printable(problem)) from None


def _runs(archive: Archive, name: str) -> list[Run]:
    head = archive.text("gpumem.json")
    version = msgspec.json.decode(head, type=_Versioned).version
    if version > VERSION:
        raise UserError(f"written by a newer version (file format {version}, this reads up to {VERSION})")
    heads = msgspec.json.decode(head, type=_Head).runs if version > 2 else _old_heads(head, archive)
    if not heads:
        raise UserError("no run is recorded in it")
    folder = "runs/{r}/{t}" if version > 2 else "traces/{t}"
    return [
        _run(of_run, name, [_read_trace(archive, folder.format(r=r, t=t), version) for t in range(of_run.traces)])
        for r, of_run in enumerate(heads)
    ]


class _Versioned(msgspec.Struct):
    version: Whole


class _Head(msgspec.Struct):
    runs: list[RunHead]


def _old_heads(packed: bytes, archive: Archive) -> list[RunHead]:
    """Versions 1 and 2 held one run: the last of an engine's, with the milestones of all."""
    head = msgspec.json.decode(packed, type=dict[str, Any])
    told = head["milestones"]
    number = max((milestone["run"] for milestone in told), default=1)
    events = [_old_event(milestone) for milestone in told if milestone["run"] == number]
    environment = msgspec.convert(head["environment"], Environment)
    traces = sum(name.startswith("traces/") and name.endswith(".json") for name in archive.names)
    kind = RunKind.WATCHED if any(event.get("watched") for event in events) else RunKind.TRAINED
    return [
        RunHead(
            id=RunId("", number, 0, environment.device),
            kind=kind,
            config=head["config"],
            environment=environment,
            gauge=msgspec.convert(head["gauge"], Gauge | None),
            events=events,
            traces=traces,
        )
    ]


def _old_event(milestone: dict[str, Any]) -> dict[str, Any]:
    """An event made of a milestone of versions 1 and 2; a None in its data stood for a default."""
    told = {name: value for name, value in milestone["data"].items() if value is not None}
    return {name: milestone[name] for name in ("kind", "text", "index", "time_s", "run")} | told


def _run(head: RunHead, name: str, traces: Sequence[StepTrace]) -> Run:
    run = Run(
        head.id._replace(engine=name),
        techniques.parse_config(head.config, "its configuration"),
        head.environment,
        head.kind,
    )
    run.gauge = run.training_gauge = head.gauge
    for event in from_plain(head.events):
        run.tell(event)
    run.keep(traces)
    return run


def _read_trace(archive: Archive, where: str, version: int) -> StepTrace:
    head = msgspec.json.decode(archive.text(f"{where}.json"), type=TraceHead)
    columns = {}
    for column, dtype in COLUMNS.items():
        name = f"{where}/{column}.npy"
        if column in ADDED and name not in archive.names:
            columns[column] = np.empty(0, dtype)
            continue
        array = archive.column(name)
        if array.dtype != dtype:
            array = _with_new_fields(array, dtype, f"{where}: {column}")
        columns[column] = array
    if version < 4:
        owners = columns["owners"] = columns["owners"].copy()
        category = owners["category"]
        owners["category"] = CATEGORIES_BEFORE_4[category]
    return trace_of(head, columns)


def _with_new_fields(array: npt.NDArray[Any], dtype: np.dtype[Any], where: str) -> npt.NDArray[Any]:
    """A column of an older version: what it had no field for was not known."""
    fields: Mapping[str, Any] = array.dtype.fields or {}
    if not fields or any(dtype[name] != fields[name][0] for name in fields if name in (dtype.names or ())):
        raise ValueError(f"{where} has another layout")
    made = np.full(array.shape, -1, dtype)
    for name in fields:
        made[name] = array[name]
    return made
