"""`gpumem-tui check`: a gate for continuous integration. Predicts runs and refuses what grows or does not fit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.config import RunConfig, UserError, parse_bytes
from ...engine.prediction import job
from ...engine.prediction.gpus import Gpu
from ...engine.prediction.known import predicted
from ...engine.prediction.prediction_text import why_not
from . import check_report
from .check_report import Checked, Limits
from .common import (
    add_run_flags,
    config_from,
    end_progress,
    parse_percent,
    refuse_beside,
    telling,
    typed_flags,
    write_output,
)
from .estimate import add_gpu_flag, chosen_gpu, say_unused

VIOLATED = 1
"""Exit code where a limit is exceeded."""

LARGEST = (1 << 63) - 1
"""Bytes: beyond it nothing is a size."""
RUN_KEYS = ("profile", "model", "preset", "set", "budget", "max_growth")


class Asked(NamedTuple):
    """A run to be checked.

    Attributes:
        name: By which a base knows it.
        config: The run.
        limits: What it may hold.
    """

    name: str
    config: RunConfig
    limits: Limits


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="a TOML file of runs, instead of the flags of one")
    add_run_flags(parser)
    add_gpu_flag(parser)
    parser.add_argument("--budget", metavar="SIZE", help="the most that may be allocated at the peak, 24GiB; what "
                        "is reserved is more, and must fit on --gpu if one is named")  # fmt: skip
    parser.add_argument("--against", metavar="BASE", help="what it must not grow beyond: JSON of an earlier check, of "
                        "estimate, run or export")  # fmt: skip
    parser.add_argument("--max-growth", metavar="SHARE", help="so much it may grow at the peak: 1%% (default: 0%%)")
    parser.add_argument("--format", choices=tuple(check_report.FORMATS), default="text")
    parser.add_argument("-o", "--output", metavar="FILE", help="where (default: standard output)")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Check; 0 if every limit is kept, 1 if one is not."""
    if flags.file:
        others = [flag for flag in typed_flags(flags) if flag != "--device"]
        refuse_beside(flags.file, others, "its runs are as they are written there")
    asked, gpu_name = _read(Path(flags.file), flags) if flags.file else ([_single(flags)], flags.gpu)
    base = _base(Path(flags.against)) if flags.against else None
    for run in asked:
        if run.limits.budget_bytes is None and base is None and gpu_name is None:
            raise UserError(f"{run.name}: nothing to check against; give it --budget, --against or --gpu")
    card = chosen_gpu(gpu_name)
    say_unused(flags.device, card)
    checked = []
    for run in asked:
        before = None if base is None else _of(base, run.name, alone=len(asked) == 1)
        checked.append(_checked(run, card, gpu_name is not None, before, is_new=base is not None and before is None))
    end_progress()
    write_output(check_report.FORMATS[flags.format](checked), flags.output)
    violations = [violation for one in checked for violation in one.violations]
    if flags.format != "text":
        sys.stderr.write("".join(f"gpumem-tui: {violation}\n" for violation in violations))
    return VIOLATED if violations else 0


def _checked(run: Asked, card: Gpu, is_named: bool, before: Mapping[str, Any] | None, is_new: bool) -> Checked:
    """A run predicted, of a job its highest rank; it has to fit where somebody said on what."""
    kinds = job.each_kind(telling(predicted, card)(run.config), lambda rank: predicted(run.config, card, rank))
    highest = max(kinds, key=lambda one: one.peak_bytes)
    limits = run.limits
    if is_named or run.config.memory_limit_bytes:
        limits = replace(limits, gpu=highest.gpu)
    return Checked(run.name, highest.as_document(), before, limits, is_new, "" if highest.fits else why_not(highest))


def _single(flags: argparse.Namespace) -> Asked:
    from ...engine.techniques import describe

    config = config_from(flags)
    budget = parse_bytes(flags.budget, "--budget") if flags.budget else None
    return Asked(describe(config), config, Limits(budget, _growth(flags)))


def _growth(flags: argparse.Namespace) -> float:
    return parse_percent(flags.max_growth, "--max-growth") if flags.max_growth else 0.0


def _read(path: Path, flags: argparse.Namespace) -> tuple[list[Asked], str | None]:
    """The runs of a file, and the GPU it names; what was typed is above what is written.

    Raises:
        UserError: The file cannot be read, or something in it cannot be.
    """
    from ...profiles.table import Table

    top = Table.read(path)
    gpu = top.text("gpu") if "gpu" in top.values else None
    budget, growth = _limits(top)
    asked = []
    for table in top.tables("runs"):
        name = table.take("name", str, "one line of text", lambda text: text.isprintable() and bool(text.strip()))
        own_budget, own_growth = _limits(table)
        table.end(*RUN_KEYS)
        limits = Limits(
            parse_bytes(flags.budget, "--budget") if flags.budget else own_budget or budget,
            _growth(flags) if flags.max_growth else own_growth if own_growth is not None else growth or 0.0,
        )
        asked.append(Asked(name, _config(table), limits))
    top.end("gpu", "budget", "max_growth", "runs")
    if not asked:
        raise UserError(f"{path}: there are no runs in it; write [[runs]] with a name and a preset or profile")
    names = [run.name for run in asked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two runs are called {twice}")
    return asked, flags.gpu or gpu


def _limits(table: Any) -> tuple[int | None, float | None]:
    found: dict[str, Any] = {}
    for key, parse in (("budget", parse_bytes), ("max_growth", parse_percent)):
        found[key] = parse(table.text(key), f"{table.where}: {key}") if key in table.values else None
    return found["budget"], found["max_growth"]


def _config(table: Any) -> RunConfig:
    """A run of a file, read as if its keys had been typed as flags."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_run_flags(parser)
    words = [
        word for key in ("profile", "model", "preset") if key in table.values for word in (f"--{key}", table.text(key))
    ]
    settings: Mapping[str, object] = table.table("set").values if "set" in table.values else {}
    for name, value in settings.items():
        typed = ("on" if value else "off") if isinstance(value, bool) else value
        words += ["--set", f"{name}={typed}"]
    try:
        return config_from(parser.parse_args(words))
    except (UserError, argparse.ArgumentError) as error:
        raise table.error(f"{table.prefix}{error}") from None


# --- the base ---------------------------------------------------------------------------


def _base(path: Path) -> dict[str, dict[str, Any]]:
    """The documents of a base by the name of their runs.

    Raises:
        UserError: It cannot be read, or is no document of a run.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        runs = read.get("runs", [read])
        found = {str(run.get("name", "")): _checked_document(run.get("report", run)) for run in runs}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not the JSON of a check, an estimate, a run or an export") from None
    if not found:
        raise UserError(f"{path}: there are no runs in it to check against")
    return found


def _checked_document(run: dict[str, Any]) -> dict[str, Any]:
    """A run's document, if it has what a comparison asks for."""
    peak = run["peak"]
    if not isinstance(run.get("environment", {}), dict):
        raise TypeError
    sizes = [*peak["by_category"].values(), *(n for kinds in peak["by_owner"].values() for n in kinds.values())]
    sizes += [n for sizes in peak["by_layer"].values() for n in sizes.values()]
    if not all(isinstance(size, int) and 0 <= size <= LARGEST for size in (peak["allocated_bytes"], *sizes)):
        raise TypeError
    return run


def _of(base: Mapping[str, dict[str, Any]], name: str, alone: bool) -> dict[str, Any] | None:
    """The run of this name; where there is one on either side, that one."""
    if alone and len(base) == 1:
        return next(iter(base.values()))
    return base.get(name)
