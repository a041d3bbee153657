"""`gpumem-tui run`: one run without the app."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...engine.categories import CATEGORIES, Category
from ...engine.config import RunConfig, UserError
from ...engine.job_source import JobSource, ranks_of
from ...engine.metrics import published
from ...engine.out_of_memory.fixes import settings_text
from ...engine.out_of_memory.report import Fix
from ...engine.out_of_memory.telling import would_fit
from ...engine.run import Run
from ...engine.run_events import Note, Saved
from ...engine.session import Session
from ...engine.techniques import describe
from ..standard_streams import complain
from ..units import GIB, MIB, UNKNOWN, Unit
from . import predicted_vs_measured
from .common import (
    add_run_flags,
    config_from,
    end_progress,
    failure_code,
    progress,
    refuse_unwritable,
    reported_run,
    save_runs,
    typed_settings,
    write_document,
)
from .job_run import job_of, reported_job

DEFAULT_STEPS = 3
MOST_RETRIES = 3


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_run_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="write the run as one JSON document; - for standard output")
    about = "predict the run too, for the GPU it runs on or the one named, and say what differs"
    parser.add_argument("--predict", metavar="GPU", nargs="?", const="", help=about)
    parser.add_argument("--save", metavar="FILE", help="write a .gpumem recording, to be opened with: gpumem-tui open")
    about = "OpenMetrics while it runs: in a file (for a textfile collector), or at http://127.0.0.1:PORT/metrics"
    parser.add_argument("--metrics", metavar="FILE|PORT", help=about)
    about = f"where it runs out of memory, go on with the first change that is predicted to fit, {MOST_RETRIES} times"
    parser.add_argument("--retry", action="store_true", help=f"{about} at most")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Run; 0 if it finished."""
    typed = typed_settings(flags)
    steps = typed.get("new_tokens", 128) if typed.get("workload") == "generate" else DEFAULT_STEPS
    config = dataclasses.replace(config_from(flags, {"steps": steps}), trace="every")
    if not config.steps:
        raise UserError("--steps 0: a run without the app needs an end; give it a number of steps from 1")
    if config.generates and config.steps < config.new_tokens:
        complain(f"--steps {config.steps}: it ends after {config.steps} of the {config.new_tokens} new tokens")
    if flags.predict is not None:
        predicted_vs_measured.check(flags.predict, config)
    for name in ("json", "save"):
        refuse_unwritable(name, getattr(flags, name))
    tries = MOST_RETRIES if flags.retry else 0
    for retry in range(tries + 1):
        code, fix = _run(flags, config, retries=retry < tries)
        if fix is None:
            break
        config = config.with_(fix.set)
        complain(f"goes on with {settings_text(fix.set)} (retry {retry + 1} of {tries})")
    return code


def _run(flags: argparse.Namespace, config: RunConfig, retries: bool) -> tuple[int, Fix | None]:
    """Run once, and write what was asked for, unless it is to be retried.

    Args:
        flags: Parsed.
        config: The run.
        retries: Whether it is if it runs out of memory.

    Returns:
        The exit code, and the change that it is to be retried with.
    """
    with ExitStack() as results:  # each is tried, whatever becomes of the others
        document, source = _reported(flags, config, results)
        end_progress()
        results.callback(source.close)
        if document["failure"]:
            complain(document["failure"])
        code = failure_code(source.runs()) if document["failure"] else 0
        fix = _out_of_memory(source.runs(), retries)
        if fix is not None:
            return code, fix
        if flags.save:
            results.callback(save_runs, source.runs(), Path(flags.save))
        environment = source.environment()
        if flags.predict is not None and environment is not None and not document["failure"]:
            document |= predicted_vs_measured.predicted(document, source.runs()[-1].config, environment, flags.predict)
        if flags.json:
            results.callback(write_document, document, flags.json)
        if flags.json != "-" and not document["failure"]:
            sys.stdout.write(f"{describe(config)}\n\n{table(document)}\n")
            if flags.predict is not None:
                sys.stdout.write(f"\n{predicted_vs_measured.table(document)}\n")
    return code, None


def _reported(
    flags: argparse.Namespace, config: RunConfig, results: ExitStack
) -> tuple[dict[str, Any], Session | JobSource]:
    """Run to the end, here or as the ranks of a job; the run's document and where its runs are.

    Args:
        flags: Parsed.
        config: The run.
        results: Told what has to end when everything is written.
    """

    def publish(source: Session | JobSource) -> None:
        if flags.metrics:
            results.enter_context(published(source, flags.metrics, config.model))

    def started(add: Callable[[Any], None]) -> Session:
        session = Session(flags.device, add)
        publish(session)
        return session

    if ranks_of(config) == 1:
        return reported_run(started, config, progress)
    job = results.enter_context(job_of(config))
    publish(job)
    return reported_job(job, progress), job


def _out_of_memory(runs: Sequence[Run], retries: bool) -> Fix | None:
    """Say where what ran out of memory is kept, and, if it is to be retried, with which change.

    Args:
        runs: Of the ranks.
        retries: Whether it is.
    """
    run = next((run for run in runs if run.refused is not None), None)
    refused = run.refused if run is not None else None
    if run is None or refused is None or refused.report is None:
        return None
    kept = next((event for event in reversed(run.events()) if isinstance(event, Saved | Note)), None)
    if kept is not None:
        complain(kept.text)
    if not retries:
        return None
    told = would_fit(run, refused.report)
    complain(told.text)
    return told.fix


def _ranks(ranks: list[dict[str, Any]], show: Callable[[int | None], str]) -> list[str]:
    """A line a rank; the figures above are the highest's."""
    lines = [f"{'rank':>6}{'loaded':>12}{'peak':>12}{'outside torch':>16}"]
    for rank in ranks:
        sizes = [rank[moment] and rank[moment]["allocated_bytes"] for moment in ("loaded", "peak")]
        lines.append(
            f"{rank['rank']:>6}{show(sizes[0]):>12}{show(sizes[1]):>12}{show(rank['outside_torch_bytes']):>16}"
        )
    return lines


def table(document: dict[str, Any]) -> str:
    """The document for people: composition by moment, then the steps."""
    peak = document["peak"]
    unit = Unit("GiB", GIB, 3) if peak and peak["allocated_bytes"] >= GIB else Unit("MiB", MIB, 3)
    show = unit.show
    share = 100 * document["trainable_parameters"] / document["parameters"]
    trained = f"{document['parameters']:,} parameters, {document['trainable_parameters']:,} trainable ({share:.4f} %)"
    moments = {name: document[name] for name in ("loaded", "after_first_step", "peak")}
    if document["config"]["workload"] == "generate":
        del moments["after_first_step"]  # which is the optimizer's
    lines = [trained, "", f"{unit.name:<16}" + "".join(f"{name.replace('_', ' '):>18}" for name in moments)]
    for category in Category:
        sizes = [m["by_category"][category.key] if m else None for m in moments.values()]
        if any(sizes) or category is Category.UNKNOWN:
            info = CATEGORIES[category]
            lines.append(f"{info.letter} {info.title:<14}" + "".join(f"{show(size):>18}" for size in sizes))
    lines.append(f"{'allocated':<16}" + "".join(f"{show(m and m['allocated_bytes']):>18}" for m in moments.values()))
    if peak:
        where = f", in {peak['module']}" if peak["module"] else ""
        lines += ["", f"The peak was in step {peak['step']}, {peak['phase']}{where}."]
    if document["managed_bytes"]:
        managed = show(document["managed_bytes"])
        lines.append(f"Paged optimizer state, in CUDA managed memory and in no figure above: {managed} {unit.name}.")
    if document["pinned_bytes"]:
        lines.append(f"On the host, page-locked and in no figure above: {show(document['pinned_bytes'])} {unit.name}.")
    if document["ranks"]:
        lines += ["", *_ranks(document["ranks"], show)]
    if document["recomputes"]:
        total = sum(r["ms"] for r in document["recomputes"])
        lines.append(f"{len(document['recomputes'])} segments were recomputed, {total:.1f} ms in all.")
    lines += ["", f"{'step':>6}{'loss':>12}{'ms':>10}{'after step':>14}{'peak':>10}{'reserved':>12}"]
    for step in document["steps"]:
        loss = UNKNOWN if step["loss"] is None else f"{step['loss']:.4f}"
        lines.append(
            f"{step['step']:>6}{loss:>12}{step['seconds'] * 1e3:>10.1f}"
            f"{show(step['allocated_bytes']):>14}{show(step['peak_bytes']):>10}{show(step['reserved_bytes']):>12}"
        )
    lines.append(f"\n{document['leaked_bytes']} bytes leaked, at most {document['unknown_bytes_max']} bytes unknown")
    return "\n".join(lines)
