"""A recording: the stream in a file. One `.gpumem` file is a zip of JSON and columns.

    gpumem.json             version, environment, configuration, gauge, milestones
    traces/<n>.json         step, names, phases
    traces/<n>/<column>.npy events, marks, begin, owners, made

Nothing in it is ever unpickled. A replay is a `Source` like any other.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import techniques
from .config import RunConfig, UserError, one_line
from .events import (
    BLOCK,
    EVENT,
    MADE,
    MARK,
    OWNER,
    Counted,
    Environment,
    Gauge,
    Kind,
    Made,
    Milestone,
    Phase,
    PhaseSpan,
    StepTrace,
)
from .feed import Command, Save, Source, ViewerRole, Work

VERSION = 2
COLUMNS = {"events": EVENT, "marks": MARK, "begin": BLOCK, "owners": OWNER, "made": MADE}


PIECE = 1 << 20
"""Bytes that are packed before it is asked whether to go on."""


def save(command: Save, source: Source, gauge: Gauge | None = None) -> tuple[Kind, str]:
    """Write a recording as asked, and tell what came of it: saved, cancelled, or why it could not be."""
    path, work = command.path, command.work
    try:
        write(path, source, gauge, work)
    except (OSError, UserError) as error:
        return Kind.NOTE if work.cancelled else Kind.REFUSED, f"{path}: not saved: {one_line(error)}"
    finally:
        work.over = True
    return Kind.SAVED, f"saved {path}"


def write(path: Path, source: Source, gauge: Gauge | None = None, work: Work | None = None) -> None:
    """Save what a source has, atomically: the file is there whole or not at all.

    Args:
        path: Where; missing folders are made.
        source: What.
        gauge: The reading to save, if not the source's latest.
        work: Told how far it is; asked whether to go on.

    Raises:
        OSError: It cannot be written there.
        UserError: There is nothing to save yet, or it was cancelled.
    """
    config, environment, gauge = source.config(), source.environment(), gauge or source.gauge()
    if config is None or environment is None:
        raise UserError("no run has started yet")
    head = {
        "version": VERSION,
        "environment": dataclasses.asdict(environment),
        "config": config.as_dict(),
        "gauge": dataclasses.asdict(gauge) if gauge else None,
        "milestones": [dataclasses.asdict(milestone) for milestone in source.milestones(0)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("gpumem.json", json.dumps(head))
            traces, work = source.traces(), work or Work()
            whole = sum(getattr(trace, column).nbytes for trace in traces for column in COLUMNS)
            for number, trace in enumerate(traces):
                _write_trace(archive, number, trace, work, whole)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_trace(archive: zipfile.ZipFile, number: int, trace: StepTrace, work: Work, whole: int) -> None:
    plain = {
        "step": trace.step,
        "names": trace.names,
        "phases": trace.phases,
        "micro_batches": trace.micro_batches,
        "counted": trace.counted,
        "descriptions": trace.descriptions,
    }
    archive.writestr(f"traces/{number}.json", json.dumps(plain))
    for column in COLUMNS:
        buffer = io.BytesIO()
        np.save(buffer, getattr(trace, column), allow_pickle=False)
        with archive.open(f"traces/{number}/{column}.npy", "w") as packed:
            for start in range(0, buffer.getbuffer().nbytes, PIECE):
                if work.cancelled:
                    raise UserError("cancelled")
                packed.write(buffer.getbuffer()[start : start + PIECE])
        work.share += getattr(trace, column).nbytes / max(whole, 1)


class Replay:
    """A recording as a `Source`.

    Args:
        path: A `.gpumem` file.

    Raises:
        UserError: It is not there, or not a recording this version can read.
    """

    live = False
    role = ViewerRole.OWNER

    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                head = json.loads(archive.read("gpumem.json"))
                if head["version"] != VERSION:
                    raise UserError(
                        f"{path}: written by another version (file format {head['version']}, this reads {VERSION})"
                    )
                count = sum(name.endswith(".json") for name in archive.namelist()) - 1
                self._traces = [_read_trace(archive, number) for number in range(count)]
            self._environment = Environment(**head["environment"])
            self._config = techniques.parse_config(head["config"], str(path))
            gauge = head["gauge"]
            self._gauge = Gauge(**(gauge | {"phase": Phase(gauge["phase"])})) if gauge else None
            self._milestones = [Milestone(**(m | {"kind": Kind(m["kind"])})) for m in head["milestones"]]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"{path}: not a gpumem recording, or a damaged one ({error})") from None

    def environment(self) -> Environment | None:
        """Where it was recorded."""
        return self._environment

    def config(self) -> RunConfig | None:
        """The recorded run's."""
        return self._config

    def gauge(self) -> Gauge | None:
        """The last reading before it was saved."""
        return self._gauge

    def trace(self) -> StepTrace | None:
        """The last one saved."""
        return self._traces[-1] if self._traces else None

    def traces(self) -> Sequence[StepTrace]:
        """All that were saved."""
        return self._traces

    def milestones(self, since: int) -> Sequence[Milestone]:
        """Milestones from an index on."""
        return [m for m in self._milestones if m.index >= since]

    def command(self, command: Command) -> None:
        """Refuse.

        Raises:
            UserError: Always: what is recorded has happened.
        """
        raise UserError(f"this is a recording: there is no engine to {type(command).__name__.lower()}")


def _read_trace(archive: zipfile.ZipFile, number: int) -> StepTrace:
    plain: dict[str, Any] = json.loads(archive.read(f"traces/{number}.json"))
    columns = {}
    for column, dtype in COLUMNS.items():
        array = np.load(io.BytesIO(archive.read(f"traces/{number}/{column}.npy")), allow_pickle=False)
        if array.dtype != dtype:
            raise ValueError(f"trace {number}: {column} has another layout")
        columns[column] = array
    return StepTrace(
        step=plain["step"],
        names=tuple(plain["names"]),
        phases=tuple(PhaseSpan(Phase(p[0]), *p[1:]) for p in plain["phases"]),
        micro_batches=plain["micro_batches"],
        counted=Counted(*plain["counted"]) if plain["counted"] else None,
        descriptions=tuple(Made(operator, dtype, tuple(shape)) for operator, dtype, shape in plain["descriptions"]),
        **columns,
    )
