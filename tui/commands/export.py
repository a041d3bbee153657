"""`gpumem-tui export`: runs as files that other programs open."""

from __future__ import annotations

import argparse
import json
import os.path
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.config import UserError, one_line
from .common import opened, telling_how_far

if TYPE_CHECKING:
    from ...engine.engine_registry import Job
    from ...engine.run import Run


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    from ...engine.exports import registry

    formats = registry().values()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(len(made.name) for made in formats)
    parser.epilog = "formats:\n" + "\n".join(f"  {made.name:<{width}}  {made.summary}" for made in formats)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="a .gpumem recording (also of a prediction: estimate --save), a snapshot of PyTorch's, or the name or "
        "PID of a running engine (see: gpumem-tui ps): its run as it is now, of a job all ranks; several go into one "
        "file",
    )
    parser.add_argument("-f", "--format", help="see below")
    about = "where; - for standard output (default: a new file here, named after the first run)"
    parser.add_argument("-o", "--output", metavar="FILE", help=about)
    parser.add_argument("--step", metavar="N", type=int, help="of which step (default: the one with the highest peak)")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of --format json, and end")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Export; 0 if the file is there."""
    from ...engine import exports
    from ...engine.exports.exported_run import named
    from ...engine.feed import Work

    if flags.schema:
        from ...engine.exports.json import schema

        sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
        return 0
    if not flags.format:
        raise UserError("--format: say which: " + ", ".join(exports.registry()))
    made = exports.format_named(flags.format)
    if not flags.runs:
        raise UserError(
            f"name a recording or a running engine to export: gpumem-tui export RUN.gpumem --format {made.name}"
        )
    work = Work()
    files, jobs = _files_and_jobs(flags.runs)
    recorded = opened(files).runs()
    taken = {run.id.engine for run in recorded}
    runs = named([*recorded, *(run for job in jobs for run in _runs_of(job, taken))], flags.step)
    if flags.output == "-":
        exports.write(runs, made, sys.stdout.buffer)
        return 0
    first = files[0].stem if files else jobs[0].name
    path = Path(flags.output or f"{first}{made.suffix}")
    if not flags.output and path.exists():
        raise UserError(f"{path}: it is there already; -o {path} writes over it, or name another file with -o")
    try:
        with telling_how_far(f"writing {path}", work):
            exports.export(runs, made, path, work)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or one_line(error)}") from None
    several = f" ({len(runs)} runs)" if len(runs) > 1 else ""
    sys.stdout.write(f"{path}{several}\n")
    return 0


def _files_and_jobs(names: Sequence[str]) -> tuple[list[Path], list[Job]]:
    """Files and running engines by name; where there is a file of a name, it is the file.

    Raises:
        UserError: It is neither.
    """
    from ...engine import engine_registry

    files: list[Path] = []
    jobs: dict[str, Job] = {}
    for name in names:
        if os.path.exists(name) and not os.path.isdir(name):  # noqa: PTH110, PTH112 (no name is too long for them)
            files.append(Path(name))
            continue
        there = engine_registry.jobs()
        job = engine_registry.job_of(name, there)
        if job is None:
            running = f"; running: {', '.join(job.name for job in there)}" if there else ""
            raise UserError(f"{name}: neither a file nor a running engine{running}")
        jobs[job.name] = job
    return files, [*jobs.values()]


def _runs_of(job: Job, taken: set[str]) -> Sequence[Run]:
    """The run of an engine that is under way or begun last, on all of its ranks, as it is now.

    Args:
        job: The engine; it is read as viewers read it, and knows of none more.
        taken: What the recordings beside it are called.

    Raises:
        UserError: It cannot be read, or has no run.
    """
    from ...engine.job_source import JobSource
    from ...engine.recording import of_all_ranks
    from ...engine.service import version

    source = JobSource(only_look=True, version=version())
    source.attach(job)
    try:
        source.wait_up_to_date()
    finally:
        source.close()
    runs = of_all_ranks(source.run, source.runs())
    if not runs:
        raise UserError(f"{job.name}: no run has begun in it, so there is nothing to export")
    name = f"{job.name} (running)" if job.name in taken else job.name
    for run in runs:
        run.id = run.id._replace(engine=name)
    return runs
