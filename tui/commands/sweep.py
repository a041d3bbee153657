"""`gpumem-tui sweep`: every row of a preset, published and measured side by side."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import sys
from typing import Any

from ...engine import techniques
from ...engine.categories import Category
from ...engine.config import RunConfig, UserError
from ...engine.report import Report
from ...engine.session import Session
from ...profiles import PresetRow, preset
from .common import FAILED, add_run_flags, config_from, end_progress, progress, run_to_end, typed_settings

GIB = 2**30

COLUMNS = (
    "row", "loaded", "gradients", "optimizer", "after_step", "peak",
    "published_after_step", "bare_after_step", "bare_peak", "composed_of", "managed", "problem",
)  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_run_flags(parser)
    parser.add_argument("--format", choices=("table", "md", "csv", "json"), default="table")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Run every row; 0 if all of them finished."""
    flags.preset = flags.preset or "reference"
    chosen = preset(flags.preset)
    base = config_from(flags)
    over = typed_settings(flags)  # holds for every row, above the row's own settings
    listed = chosen.rows or (PresetRow(chosen.name, {}, {}, {}),)
    planned: list[tuple[PresetRow, RunConfig]] = []
    if base.model != chosen.model:  # what was published speaks of the preset's model only
        listed = tuple(PresetRow(row.name, row.settings, {}, {}) for row in listed)
    for row in listed:
        config = base.with_(techniques.parse(row.settings, chosen.where) | over)
        techniques.check(config)
        planned.append((row, dataclasses.replace(config, trace="every", steps=config.steps or 3)))
    report = Report()
    session = Session(flags.device, lambda trace: report.add(trace))  # noqa: PLW0108 (a new report every row)
    results = []
    for row, config in planned:
        report = Report()
        results.append(_result(row, _run_row(session, report, config)))
    end_progress()
    session.close()
    sys.stdout.write(FORMATS[flags.format](results))
    return FAILED if any(r["problem"] for r in results) else 0


def _run_row(session: Session, report: Report, config: RunConfig) -> dict[str, Any]:
    try:
        run = run_to_end(session, config, progress)
    except UserError as error:  # this row cannot run here; the others may
        return {"failure": str(error), "config": config.as_dict()}
    return report.document(run).as_dict()


def _result(row: PresetRow, document: dict[str, Any]) -> dict[str, Any]:
    """One line of the table; sizes in GiB, as the reference experiment gives them."""
    after, loaded, peak = (document.get(key) for key in ("after_first_step", "loaded", "peak"))
    sizes = after["by_category"] if after else {}
    return {
        "row": row.name,
        "loaded": _gib(loaded and loaded["allocated_bytes"]),
        "gradients": _gib(sizes.get(Category.GRADIENTS.key)),
        "optimizer": _gib(sizes.get(Category.OPTIMIZER_STATE.key)),
        "after_step": _gib(after and after["allocated_bytes"]),
        "peak": _gib(max((s["peak_bytes"] for s in document.get("steps", [])), default=None)),
        "published_after_step": row.published.get("after_step"),
        "bare_after_step": row.bare_h100.get("after_step"),
        "bare_peak": row.bare_h100.get("peak_all_steps"),
        "composed_of": " + ".join(
            f"{category.info.title} {sizes[category.key] / GIB:.3f}"
            for category in Category
            if sizes.get(category.key, 0) >= GIB // 2000
        ),
        "managed": _gib(document.get("managed_bytes")),
        "problem": document.get("failure"),
        "document": document,
        "peak_in": f"{peak['phase']}, {peak['module']}" if peak else None,
    }


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(results: list[dict[str, Any]]) -> str:
    columns = ("row", "loaded", "gradients", "optimizer", "after_step", "published_after_step",
               "bare_after_step", "peak", "bare_peak")  # fmt: skip
    heads = ("GiB", "loaded", "gradients", "optimizer", "after step", "published", "bare H100", "peak", "bare peak")
    width = max(len(r["row"]) for r in results) + 2
    lines = [f"{heads[0]:<{width}}" + "".join(f"{h:>12}" for h in heads[1:])]
    for r in results:
        lines.append(f"{r['row']:<{width}}" + "".join(f"{_cell(r[c]):>12}" for c in columns[1:]))
        if r["problem"]:
            lines.append(f"  {r['problem']}")
        else:
            lines.append(f"  after step: {r['composed_of']}")
            lines.append(f"  peak in {r['peak_in']}")
    return "\n".join(lines) + "\n"


def _md(results: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cell(r[c]) for c in COLUMNS) + " |" for r in results]
    return "\n".join(lines) + "\n"


def _csv(results: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    return out.getvalue()


def _json(results: list[dict[str, Any]]) -> str:
    return json.dumps({"schema": "gpumem-sweep/1", "unit": "GiB", "rows": results}, indent=1) + "\n"


FORMATS = {"table": _table, "md": _md, "csv": _csv, "json": _json}
