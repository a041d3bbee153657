"""Several GPUs: every way to train on them, predicted against measured, on all GPUs that are visible.

    python -m tests.benchmarks.ranks [--ranks N] [--quick] [--only TEXT] [--json FILE]

The ways x {full, LoRA} x checkpointing x accumulation over four model
families. One job of processes runs all configurations one after the other; another is
started where a run has ended one. A third, marked *, is held out while predictions are
developed. Measured: the allocator's own peak of every rank; what is unknown and what
leaks has to be 0. `--quick` is one configuration of each way, in a model of 0.5 B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.feed import End, Start, ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.gpus import Gpu
from gpumem_tui.engine.report import report
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import Loaded, StepEnded
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.units import GIB

STEPS = 3
RUN_WITHIN_S = 240.0
LOOK_EVERY_S = 0.05
PREDICTORS = 4
Settings = Mapping[str, Any]

WAYS: dict[str, Settings] = {
    "ddp": {"parallel": "ddp"},
    "ddp views": {"parallel": "ddp", "parallel.bucket_view": True},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2 no reshard": {"parallel": "fsdp2", "parallel.reshard": False},
    "fsdp2 hybrid": {"parallel": "fsdp2", "parallel.shard": "hybrid"},
    "fsdp2 offload": {"parallel": "fsdp2", "parallel.offload": True},
    "fsdp2 mixed": {"parallel": "fsdp2", "dtype": "mixed"},
    "zero1": {"parallel": "zero1"},
    "zero2": {"parallel": "zero2"},
    "zero3": {"parallel": "zero3"},
}
FAMILIES: dict[str, Settings] = {
    "qwen2.5-0.5b": {"batch_size": 4, "seq_len": 512},
    "llama-3.2-1b": {"batch_size": 2, "seq_len": 512},
    "polyglot-ko-1.3b": {"batch_size": 4, "dtype": "bfloat16"},
    "gpt2": {"batch_size": 8, "seq_len": 512},
}
REST: tuple[Settings, ...] = (
    {},
    {"lora": True, "checkpointing": "layers"},
    {"checkpointing": "layers", "accumulation": 2},
    {"lora": True, "accumulation": 2},
    {"accumulation": 2},
)


class Row(NamedTuple):
    """One configuration, and whether predictions were written without looking at it."""

    config: RunConfig
    held_out: bool


def matrix(ranks: int, quick: bool) -> Iterator[Row]:
    """The configurations; what cannot be combined is left out."""
    families = list(FAMILIES)[:1] if quick else FAMILIES
    number = 0
    for place, model in enumerate(families):
        for index, way in enumerate(WAYS.values()):
            rest = REST[(index + 2 * place) % len(REST)]
            settings = {**FAMILIES[model], **rest, **way, "parallel.ranks": ranks}
            if way.get("parallel.shard") == "hybrid" and ranks < 4:
                continue
            config = techniques.configure(run_fields(model), techniques.parse({"steps": STEPS} | settings, "matrix"))
            number += 1
            yield Row(config, number % 3 == 0)


def predicted(config: Mapping[str, Any], card: Gpu) -> dict[str, Any]:
    """The prediction's document; on a process of its own."""
    from gpumem_tui.engine.prediction import known

    try:
        return known.predicted(techniques.parse_config(config, "matrix"), card).as_document()
    except UserError as error:
        return {"failure": str(error)}


class Machine:
    """A job on all GPUs, started when it is needed."""

    def __init__(self) -> None:
        self._source: JobSource | None = None

    def run(self, config: RunConfig) -> tuple[list[Run], str | None]:
        """The runs of all ranks, rank 0 first, and why they failed, if they did."""
        source, before = self._source, 0
        if source is None or source.role is ViewerRole.GONE:
            self.close()
            source = self._source = JobSource(Launcher())
            source.start(config)
        else:
            before = max(run.id.number for run in source.runs())
            source.command(Start(config))
        until_s, never = time.monotonic() + RUN_WITHIN_S, threading.Event()
        while time.monotonic() < until_s:
            source.events(0)
            runs = [run for run in source.runs() if run.id.number > before]
            if runs and len(runs) == len(source.members) and all(run.ended and run.latest for run in runs):
                never.wait(1.0)  # the last traces are on their way
                return runs[::-1], None
            if source.role is ViewerRole.GONE:
                return runs[::-1], source.events(0)[-1].text
            never.wait(LOOK_EVERY_S)
        self.close()
        return [], f"not ended within {RUN_WITHIN_S:.0f} s"

    def close(self) -> None:
        """End the job."""
        source, self._source = self._source, None
        if source is None:
            return
        if source.role is not ViewerRole.GONE:
            source.command(End())
            source.wait_ended(30)
        source.close()


def measured(runs: list[Run]) -> list[dict[str, Any]]:
    """What each rank held."""
    rows = []
    for run in runs:
        steps = [event for event in run.events() if isinstance(event, StepEnded)]
        loaded = next((event.allocated_bytes for event in run.events() if isinstance(event, Loaded)), None)
        gauge, document = run.gauge, report(run)
        rows.append({
            "rank": run.id.rank,
            "loaded_bytes": loaded,
            "peak_bytes": max((step.peak_bytes or 0 for step in steps), default=0),
            "reserved_bytes": steps[-1].reserved_bytes if steps else None,
            "outside_torch_bytes": None if gauge is None else (
                gauge.beyond_torch_bytes if gauge.beyond_torch_bytes is not None
                else (gauge.device_used_bytes or 0) - (gauge.reserved_bytes or 0)
            ),
            "unknown_bytes": document.unknown_bytes_max,
            "leaked_bytes": run.ended.leaked_bytes if run.ended else None,
            "seconds": [step.seconds for step in steps],
            "by_category": document.peak.by_category if document.peak else None,
        })  # fmt: skip
    return rows


def compare(row: Row, runs: list[Run], failure: str | None, told: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    ranks = measured(runs)
    name = techniques.describe(row.config).replace(f" steps={STEPS}", "")
    made: dict[str, Any] = {"config": name, "held_out": row.held_out, "ranks": ranks}
    failure = failure or told.get("failure") or (None if ranks and ranks[0]["peak_bytes"] else "no step ended")
    if failure:
        return made | {"failure": failure}
    by_rank = {one["rank"]: one["peak"]["allocated_bytes"] for one in told.get("ranks") or [] if one["peak"]}
    highest = told["peak"]["allocated_bytes"]
    errors = [100 * (by_rank.get(one["rank"], highest) / one["peak_bytes"] - 1) for one in ranks]
    peak = max(one["peak_bytes"] for one in ranks)
    return made | {
        "measured_bytes": peak,
        "predicted_bytes": highest,
        "predicted_by_category": told["peak"]["by_category"],
        "error_percent": max(errors, key=abs),
        "bound_percent": 100 * (told["safe_bound_bytes"] / peak - 1),
        "unknown_bytes": max(one["unknown_bytes"] for one in ranks),
        "leaked_bytes": sum(one["leaked_bytes"] or 0 for one in ranks),
        "outside_torch_bytes": max(one["outside_torch_bytes"] or 0 for one in ranks),
        "predicted_outside_torch_bytes": told.get("outside_torch_bytes"),
    }


def show(row: dict[str, Any]) -> str:
    """One line for people."""
    name = f"{'*' if row['held_out'] else ' '} {row['config']}"[:100]
    if "failure" in row:
        return f"{name:<100} {row['failure'][:200]}"
    outside = row["predicted_outside_torch_bytes"]
    return (
        f"{name:<100}{row['predicted_bytes'] / GIB:>9.3f}{row['measured_bytes'] / GIB:>9.3f}"
        f"{row['error_percent']:>9.3f}{row['bound_percent']:>8.2f}{row['unknown_bytes']:>12}{row['leaked_bytes']:>8}"
        f"{row['outside_torch_bytes'] / GIB:>9.3f}{'-' if outside is None else f'{outside / GIB:.3f}':>8}"
    )


def summary(title: str, rows: list[dict[str, Any]]) -> None:
    """Errors of rows, in a line."""
    errors = sorted(abs(row["error_percent"]) for row in rows if "failure" not in row)
    failed = sum("failure" in row for row in rows)
    if errors:
        under = sum(row["bound_percent"] < 0 for row in rows if "failure" not in row)
        print(f"{title}: {len(errors)} of {len(rows)}, median {statistics.median(errors):.3f} %, "
              f"worst {errors[-1]:.3f} %, under the bound {under}, failed {failed}")  # fmt: skip


def main() -> int:
    """Print the table; 0 if everything ran, and no byte was unknown or leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="rows whose description has this in it")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args()
    card = gpu_here()
    if card is None:
        sys.exit("this needs GPUs: it measures what it predicts")
    import torch

    ranks = flags.ranks or torch.cuda.device_count()
    wanted = [row for row in matrix(ranks, flags.quick) if flags.only in techniques.describe(row.config)]
    machine, rows = Machine(), []
    print(f"{f'GiB, {ranks} x {card.name}':<100}{'predicted':>9}{'measured':>9}{'error %':>9}{'bound %':>8}"
          f"{'unknown B':>12}{'leaked':>8}{'outside':>9}{'~':>8}")  # fmt: skip
    with ProcessPoolExecutor(PREDICTORS, mp_context=get_context("spawn")) as pool:
        told: list[Future[dict[str, Any]]] = [pool.submit(predicted, row.config.as_dict(), card) for row in wanted]
        try:
            for row, prediction in zip(wanted, told, strict=True):
                runs, failure = machine.run(row.config)
                rows.append(compare(row, runs, failure, prediction.result()))
                print(show(rows[-1]), flush=True)
                if flags.json:
                    document = {"gpu": card.name, "ranks": ranks, "torch": torch.__version__, "rows": rows}
                    Path(flags.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        finally:
            machine.close()
    summary("all", rows)
    summary("held out", [row for row in rows if row["held_out"]])
    summary("DeepSpeed", [row for row in rows if "parallel=zero" in row["config"]])
    sound = all("failure" not in row and not row["unknown_bytes"] and not row["leaked_bytes"] for row in rows)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
