"""Several GPUs: every way to train on them, predicted against measured, on all GPUs that are visible.

    python -m tests.benchmarks.ranks [--ranks N] [--quick] [--only TEXT] [--json FILE] [--measure-only]
    python -m tests.benchmarks.ranks --predict FILE

The ways x {full, LoRA} x checkpointing x accumulation over four model families. One
job of processes runs all configurations one after the other, the most different
first; another is started where a run has ended one. A third, marked *, is held out
while predictions are developed. Measured: the allocator's own peak of every rank; what
is unknown and what leaks has to be 0. `--quick` is one configuration of each way, in a
model of 0.5 B.

In the second step of DDP NCCL holds the first bucket for longer on some ranks, by chance:
it is beside the predicted peak, part of the bound alone. Where a rank's own trace has it at
the peak, it is counted to what was predicted for that rank.

`--measure-only` leaves the predictions out: `--predict` adds them to the file, on any
machine. Without GPUs `--profile tiny --measure-only` runs the whole on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.events import COMPLETE
from gpumem_tui.engine.feed import End, Start, ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.gpus import Gpu, gpu
from gpumem_tui.engine.report import report
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import Loaded, StepEnded
from gpumem_tui.engine.tracing.buckets import GIVEN_UP
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.units import GIB

STEPS = 3
RUN_WITHIN_S = 240.0
LOOK_EVERY_S = 0.05
PREDICTORS = min(4, os.cpu_count() or 1)
CPU_RANKS = 2
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
LONGEST = ("zero3",)
"""They are run last: should the time on GPUs end, all others have been measured."""
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


def matrix(ranks: int, families: Sequence[str]) -> list[Row]:
    """The configurations, neighbours of another way and another family; what cannot be combined is left out.

    Args:
        ranks: Of the job.
        families: Profiles; one that is not among FAMILIES is trained as it is.
    """
    rows: list[tuple[tuple[bool, int, int], Row]] = []
    for place, model in enumerate(families):
        for index, (name, way) in enumerate(WAYS.items()):
            rest = REST[(index + 2 * place) % len(REST)]
            settings = {"steps": STEPS, **FAMILIES.get(model, {}), **rest, **way, "parallel.ranks": ranks}
            if way.get("parallel.shard") == "hybrid" and ranks < 4:
                continue
            config = techniques.configure(run_fields(model), techniques.parse(settings, "matrix"))
            held_out = len(rows) % 3 == 2
            order = name in LONGEST, (place - index) % len(families), index
            rows.append((order, Row(replace(config, trace="every"), held_out)))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


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

    @property
    def is_new(self) -> bool:
        """True if the next run is the first of a job."""
        return self._source is None or self._source.role is ViewerRole.GONE

    def run(self, config: RunConfig) -> tuple[list[Run], str | None]:
        """The runs of all ranks, rank 0 first, and why they failed, if they did."""
        source, before = self._source, 0
        if source is None or self.is_new:
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
            if len(runs) == len(source.members) > 0 and all(map(_is_whole, runs)):
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


def _is_whole(run: Run) -> bool:
    """True if a run has ended, and all that was traced of it has arrived."""
    if run.ended is None or run.latest is None:
        return False
    return run.ended.reason == "failed" or (run.latest.step == STEPS and run.latest.ending == COMPLETE)


def measured(runs: list[Run]) -> list[dict[str, Any]]:
    """What each rank held."""
    rows = []
    for run in runs:
        steps = [event for event in run.events() if isinstance(event, StepEnded)]
        loaded = next((event for event in run.events() if isinstance(event, Loaded)), None)
        gauge, document = run.gauge, report(run)
        rows.append({
            "rank": run.id.rank,
            "loaded_bytes": loaded.allocated_bytes if loaded else None,
            "load_seconds": loaded.seconds if loaded else None,
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
            "held_bytes": held_by_nccl(run, document.peak.step) if document.peak else 0,
        })  # fmt: skip
    return rows


def held_by_nccl(run: Run, step: int) -> int:
    """The buckets that DDP has given up and that are there nevertheless at a step's peak."""
    ledger = next(Ledger(trace) for trace in run.traces() if trace.step == step)
    alive = np.flatnonzero(ledger.is_alive(ledger.peak.event)).tolist()
    blocks = ((ledger.blocks[row], ledger.describe(row).name) for row in alive)
    return sum(int(block["bytes"] + block["slack"]) for block, name in blocks if name == GIVEN_UP)


def measured_row(row: Row, machine: Machine) -> dict[str, Any]:
    """What one configuration took and held on this machine."""
    began, first = time.monotonic(), machine.is_new
    runs, failure = machine.run(row.config)
    ranks = measured(runs)
    made = {
        "config": name_of(row.config),
        "held_out": row.held_out,
        "first_of_job": first,
        "seconds": time.monotonic() - began,
        "ranks": ranks,
    }
    failure = failure or (None if ranks and ranks[0]["peak_bytes"] else "no step ended")
    return made | ({"failure": failure} if failure else {})


def name_of(config: RunConfig) -> str:
    """The configuration, by which its row is found again."""
    return techniques.describe(config).replace(f" steps={STEPS}", "")


def compare(made: dict[str, Any], told: dict[str, Any] | None) -> dict[str, Any]:
    """A row of the table: what was measured beside what was predicted, if it was."""
    ranks = made["ranks"]
    if "failure" in made or not ranks:
        return made
    peak = max(one["peak_bytes"] for one in ranks)
    made |= {
        "measured_bytes": peak,
        "unknown_bytes": max(one["unknown_bytes"] for one in ranks),
        "leaked_bytes": sum(one["leaked_bytes"] or 0 for one in ranks),
        "outside_torch_bytes": max(one["outside_torch_bytes"] or 0 for one in ranks),
        "held_bytes": max(one.get("held_bytes", 0) for one in ranks),
    }
    if told is None:
        return made
    if told.get("failure"):
        return made | {"prediction_failure": told["failure"]}
    by_rank = {one["rank"]: one["peak"]["allocated_bytes"] for one in told.get("ranks") or [] if one["peak"]}
    highest = told["peak"]["allocated_bytes"]
    errors = [
        100 * ((by_rank.get(one["rank"], highest) + one.get("held_bytes", 0)) / one["peak_bytes"] - 1) for one in ranks
    ]
    made.pop("prediction_failure", None)
    return made | {
        "predicted_bytes": highest,
        "predicted_by_category": told["peak"]["by_category"],
        "error_percent": max(errors, key=abs),
        "bound_percent": 100 * (told["safe_bound_bytes"] / peak - 1),
        # Communicators stay from run to run: only for a job's first run are they what it needs.
        "predicted_outside_torch_bytes": told.get("outside_torch_bytes") if made.get("first_of_job") else None,
    }


HEAD = (
    f"{'predicted':>10}{'measured':>9}{'error %':>9}{'bound %':>8}{'unknown B':>10}{'leaked':>7}{'outside':>8}{'~':>7}"
    f"{'load s':>8}{'steps s':>8}{'all s':>7}"
)


def show(row: dict[str, Any]) -> str:
    """One line for people."""
    name = f"{'*' if row['held_out'] else ' '} {row['config']}"[:100]
    if "failure" in row:
        return f"{name:<100} {row['failure'][:200]}"
    load, steps = (max(times) for times in zip(*map(_times, row["ranks"]), strict=True))
    error, bound = row.get("error_percent"), row.get("bound_percent")
    return (
        f"{name:<100}{_gib(row.get('predicted_bytes')):>10}{_gib(row['measured_bytes']):>9}"
        f"{'-' if error is None else f'{error:.3f}':>9}{'-' if bound is None else f'{bound:.2f}':>8}"
        f"{row['unknown_bytes']:>10}{row['leaked_bytes']:>7}"
        f"{_gib(row['outside_torch_bytes']):>8}{_gib(row.get('predicted_outside_torch_bytes')):>7}"
        f"{load:>8.1f}{steps:>8.1f}{row.get('seconds', 0.0):>7.1f} {row.get('prediction_failure', '')[:200]}"
    )


def _times(rank: dict[str, Any]) -> tuple[float, float]:
    """Seconds of loading, and of all steps."""
    return rank.get("load_seconds") or 0.0, sum(rank["seconds"])


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.3f}"


def summary(title: str, rows: list[dict[str, Any]]) -> None:
    """Errors of rows, in a line."""
    predicted_ = [row for row in rows if "error_percent" in row]
    errors = sorted(abs(row["error_percent"]) for row in predicted_)
    failed = sum("failure" in row or "prediction_failure" in row for row in rows)
    if errors:
        under = sum(row["bound_percent"] < 0 for row in predicted_)
        print(f"{title}: {len(errors)} of {len(rows)}, median {statistics.median(errors):.3f} %, "
              f"worst {errors[-1]:.3f} %, under the bound {under}, failed {failed}")  # fmt: skip
    elif rows:
        print(f"{title}: {len(rows)} measured, failed {failed}")


class Document:
    """The rows so far, printed and written as they come.

    Args:
        header: The GPU, the ranks, versions.
        path: The JSON file; None: none is written.
    """

    def __init__(self, header: dict[str, Any], path: str | None) -> None:
        self._header, self._path = header, path
        self.rows: list[dict[str, Any]] = []
        print(f"{'GiB, {ranks} x {gpu}'.format(**header):<100}{HEAD}")

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)
        print(show(row), flush=True)
        if self._path:
            text = json.dumps(self._header | {"rows": self.rows}, indent=1)
            Path(self._path).write_text(text + "\n", encoding="utf-8")

    def end(self) -> int:
        """Print the summaries; 0 if everything ran, and no byte was unknown or leaked."""
        rows = self.rows
        summary("all", rows)
        summary("held out", [row for row in rows if row["held_out"]])
        summary("DeepSpeed", [row for row in rows if "parallel=zero" in row["config"]])
        print(f"{sum(row.get('seconds', 0.0) for row in rows):.0f} s")
        bad = ("failure", "prediction_failure", "unknown_bytes", "leaked_bytes")
        return int(any(row.get(name) for row in rows for name in bad))


def measure(flags: argparse.Namespace) -> int:
    """Run the matrix here, and predict it meanwhile if that is wanted."""
    import torch

    card = gpu_here()
    if card is None and not flags.measure_only:
        sys.exit("this needs GPUs: it measures what it predicts; on a CPU it can --measure-only")
    ranks = flags.ranks or torch.cuda.device_count() or CPU_RANKS
    families = [flags.profile] if flags.profile else list(FAMILIES)[: 1 if flags.quick else None]
    wanted = [row for row in matrix(ranks, families) if flags.only in techniques.describe(row.config)]
    header = {"gpu": card.name if card else "CPU", "ranks": ranks, "torch": torch.__version__}
    document, machine = Document(header, flags.json), Machine()

    def run(tell: Callable[[int], dict[str, Any] | None]) -> None:
        try:
            for index, row in enumerate(wanted):
                made = measured_row(row, machine)
                document.add(compare(made, tell(index)))
        finally:
            machine.close()

    if flags.measure_only or card is None:
        run(lambda _: None)
    else:
        with predictions([row.config for row in wanted], card) as told:
            run(lambda index: told[index].result())
    return document.end()


@contextmanager
def predictions(configs: Sequence[RunConfig], card: Gpu) -> Iterator[list[Future[dict[str, Any]]]]:
    """Predictions under way, on processes of their own."""
    with ProcessPoolExecutor(PREDICTORS, mp_context=get_context("spawn")) as pool:
        try:
            yield [pool.submit(predicted, config.as_dict(), card) for config in configs]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def predict(path: str, only: str) -> int:
    """Add predictions to what was measured, on a machine that need have no GPU."""
    header = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = header.pop("rows")
    families = dict.fromkeys(row["config"].partition(" ")[0] for row in rows)
    known = {name_of(row.config): row.config for row in matrix(header["ranks"], [*FAMILIES, *families])}
    card, document = gpu(header["gpu"]), Document(header, path)
    wanted = [row["config"] for row in rows if only in row["config"] and row["config"] in known]
    with predictions([known[name] for name in wanted], card) as told:
        of_name = dict(zip(wanted, told, strict=True))
        for row in rows:
            found = of_name.get(row["config"])
            document.add(compare(row, found.result() if found else None))
    return document.end()


def main() -> int:
    """Print the table; 0 if everything ran, and no byte was unknown or leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="rows whose description has this in it")
    parser.add_argument("--profile", help="this model instead of the four families")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--measure-only", action="store_true", help="leave predictions to --predict")
    parser.add_argument("--predict", metavar="FILE", help="predict what was measured into this file, and add it")
    flags = parser.parse_args()
    return predict(flags.predict, flags.only) if flags.predict else measure(flags)


if __name__ == "__main__":
    sys.exit(main())
