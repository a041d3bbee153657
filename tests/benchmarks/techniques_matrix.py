"""Techniques, predicted against measured and exact to the byte, on one GPU in some minutes.

    python -m tests.benchmarks.techniques_matrix [--json FILE] [--only TEXT] [--markdown]

Real widths, six layers, three families. Each configuration is predicted, run for three
steps with every step traced, and compared; beside that stand the most bytes unknown, how
far the ledger is off the allocator's own counters, and bytes leaked: 0/0/0. What is marked
with * was held out: no prediction was written by it. One that fails is a line like any other.
`--markdown` prints instead what each technique saves on one example, for the README.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import Architecture, RunConfig, UserError, one_line
from gpumem_tui.engine.config import show as show_value
from gpumem_tui.engine.device import environment
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.predictor import Answer, Predictor
from gpumem_tui.engine.run_events import RunEnded
from gpumem_tui.engine.session import Session
from gpumem_tui.engine.techniques import describe
from gpumem_tui.profiles import run_fields

from .exactness import Check
from .prediction import GIB, compare, measure, summary

LAYERS = 6
STEPS = 3
Settings = dict[str, Any]

LORA: Settings = {"lora": True}
QLORA: Settings = {"lora": True, "quantization": "nf4"}
BODY: Settings = {"kv_cache": False, "keep_outputs": False}
CHECKPOINTED: Settings = BODY | {"checkpointing": "layers"}
BF16: Settings = {"dtype": "bfloat16"}

ROWS: list[Settings] = [
    {"loss": "chunked", **BODY},
    {"loss": "linear-cross-entropy", **BODY, **BF16},
    {"checkpointing": "selective", **BODY, **BF16},
    {"offload": "activations", **BODY, **BF16},
    {"offload": "checkpoints", **CHECKPOINTED, **BF16},
    {"optimizer": "ao-adamw-8bit", **BF16},
    {"optimizer": "cpu-offload", **BF16},
    {"optimizer": "muon", **BF16},
    {"optimizer_in_backward": True, **CHECKPOINTED, **BF16},
    {"trainable": "last-layers", **BF16},
    {"lora.kind": "dora", **LORA, **BF16},
    {"allocator": "expandable-segments", **BF16},
    {"packing": "padded", **BODY, **BF16},
    # held out
    {"packing": "packed", **CHECKPOINTED, "loss": "chunked", **BF16},
    {"allocator": "expandable-segments", "allocator.rounding": 4, "loss": "chunked", **CHECKPOINTED, **BF16},
    {"loss_scaling": True, "dtype": "mixed-float16", **BODY},
    {"optimizer": "ao-adamw-4bit", "loss": "chunked", **CHECKPOINTED, "dtype": "mixed"},
    {"offload": "activations", **QLORA, "loss": "chunked", **BODY, **BF16},
    {"trainable": "norms-biases", "checkpointing": "selective", **BODY, **BF16},
    {"lora.kind": "pissa", **LORA, "offload": "checkpoints", **CHECKPOINTED, **BF16},
    {"optimizer": "muon", "loss": "linear-cross-entropy", **CHECKPOINTED, **BF16},
    {"optimizer": "ao-adamw-fp8", "optimizer_in_backward": True, **BODY, **BF16},
    {"lora.kind": "dora", **QLORA, **CHECKPOINTED, "dtype": "mixed"},
    {"quantization.prepared": False, **QLORA, **CHECKPOINTED, **BF16},
    {"offload": "activations", "offload.stream": True, **BODY, **BF16},
    {"offload": "checkpoints", "offload.stream": True, "loss": "chunked", **CHECKPOINTED, **BF16},
]
SEEN = 13
"""How many of the rows predictions were written by."""

FAMILIES: dict[str, Settings] = {
    "polyglot-ko-1.3b": {"batch_size": 8, "seq_len": 512},
    "llama-3.2-1b": {"batch_size": 4, "seq_len": 512},
    "qwen2.5-0.5b": {"batch_size": 2, "seq_len": 1024},
}

EXAMPLE: Settings = {"batch_size": 4, "seq_len": 1024, **BF16, "kv_cache": True, "optimizer": "adamw"}
"""Of the table for the README, on llama-3.2-1b with all of its layers."""

SAVES: list[Settings] = [
    {"kv_cache": False},
    {"keep_outputs": False},
    {"loss": "chunked"},
    {"checkpointing": "layers"},
    {"checkpointing": "selective"},
    {"offload": "activations"},
    {"checkpointing": "layers", "offload": "checkpoints"},
    {"optimizer": "adamw-fused"},
    {"optimizer": "adamw-8bit"},
    {"optimizer": "ao-adamw-4bit"},
    {"optimizer": "cpu-offload"},
    {"optimizer": "muon"},
    {"optimizer_in_backward": True},
    {"trainable": "last-layers"},
    {"lora": True},
    {"lora": True, "quantization": "nf4"},
    {"accumulation": 4, "batch_size": 1},
]


def cut(model: str, layers: int | None) -> dict[str, Any]:
    """The fields of a profile's run, of fewer layers."""
    fields = run_fields(model)
    whole: Architecture = fields["architecture"]
    if layers is None:
        return fields
    return fields | {"architecture": dataclasses.replace(whole, config=whole.fields() | {"num_hidden_layers": layers})}


def configs(only: str) -> Iterator[tuple[RunConfig, bool]]:
    """The matrix, and whether a configuration was held out."""
    for model, size in FAMILIES.items():
        for index, row in enumerate(ROWS):
            yield from (
                (config, index >= SEEN)
                for config in configured(cut(model, LAYERS), size | row)
                if only in describe(config)
            )


def configured(base: dict[str, Any], settings: Settings) -> Iterator[RunConfig]:
    """A configuration of some traced steps; none where it makes no sense, or a package is missing."""
    try:
        config = techniques.configure(base, techniques.parse({"steps": STEPS} | settings, "matrix"))
        if torch.cuda.is_available():
            techniques.check(config, environment(torch.device("cuda", 0)))
    except UserError as error:
        print(f"left out: {error}", flush=True)
        return
    yield dataclasses.replace(config, trace="every")


class Bench:
    """A session on this machine's GPU, and its predictor beside it."""

    def __init__(self) -> None:
        info = gpu_here()
        if info is None:
            sys.exit("this needs a GPU: it measures what it predicts")
        self.check = Check()
        self.gpu, self.predictor = info.name, Predictor(info)
        self.session = Session("cuda", lambda trace: self.check(trace))  # noqa: PLW0108 (check is another one every row)

    def row(self, config: RunConfig, predicted: Callable[[], Answer]) -> dict[str, Any]:
        """Measure one configuration; whatever goes wrong becomes a part of the row."""
        self.check, began = Check(), time.perf_counter()
        before = len(self.session.events(0))
        try:
            steps, failure = measure(self.session, config, trace="every")
            row = compare(config, predicted(), steps, failure)
        except Exception as error:
            row = {"config": describe(config), "failure": one_line(error)}
        ended = [event for event in list(self.session.events(0))[before:] if isinstance(event, RunEnded)]
        return row | {
            "unknown_bytes": self.check.unknown,
            "mismatch_bytes": self.check.mismatch,
            "leaked_bytes": sum(event.leaked_bytes or 0 for event in ended),
            "pinned_bytes": max((event.pinned_bytes or 0 for event in ended), default=0),
            "predicted_pinned_bytes": getattr(predicted(), "pinned_bytes", None),
            "run_seconds": time.perf_counter() - began,
            "where": self.check.where,
        }

    def answer(self, config: RunConfig) -> Answer:
        """The prediction, once it is there."""
        while (answer := self.predictor.get(config)) is None:
            self.predictor.wait(1.0)
        return answer

    def close(self) -> None:
        """End both."""
        self.predictor.close()
        self.session.close()


def show(row: dict[str, Any]) -> str:
    """One line for people."""
    name = f"{'*' if row['held_out'] else ' '} {row['config']}"[:104]
    exact = "/".join(str(row[f"{part}_bytes"]) for part in ("unknown", "mismatch", "leaked"))
    if "failure" in row:
        return f"{name:<104} {row['failure'][:160]}  {exact}"
    return (
        f"{name:<104}{row['predicted_bytes'] / GIB:>8.3f}{row['measured_bytes'] / GIB:>8.3f}"
        f"{row['error_percent']:>8.3f}{row['bound_percent']:>7.2f}{row['run_seconds']:>6.1f}  {exact}"
    )


def matrix(bench: Bench, only: str, target: Path | None) -> int:
    """Measure all of it; 0 if every figure is as it should be."""
    wanted, rows = list(configs(only)), list[dict[str, Any]]()
    bench.predictor.want([config for config, _ in wanted])
    print(f"{'GiB':<104}{'pred.':>8}{'meas.':>8}{'err %':>8}{'bound':>7}{'s':>6}  unknown/off/leaked")
    for config, held_out in wanted:
        rows.append(bench.row(config, partial(bench.answer, config)) | {"held_out": held_out})
        print(show(rows[-1]), flush=True)
        if target is not None:
            target.write_text(json.dumps({"gpu": bench.gpu, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for title, chosen in (("all", rows), ("held out (*)", [row for row in rows if row["held_out"]])):
        summary(title, chosen)
    inexact = [row for row in rows if row["unknown_bytes"] or row["mismatch_bytes"] or row["leaked_bytes"]]
    failed = [row for row in rows if "failure" in row]
    print(f"{len(rows)} configurations, {len(failed)} failed, {len(inexact)} not exact")
    return int(bool(failed or inexact))


def markdown(bench: Bench) -> int:
    """What each technique saves at the measured peak of one example."""
    base = cut("llama-3.2-1b", None)
    (plain,) = configured(base, EXAMPLE)
    bench.predictor.want([plain])
    now = bench.row(plain, partial(bench.answer, plain))
    if "failure" in now:
        print(now["failure"])
        return 1
    peak = now["measured_bytes"]
    print(f"llama-3.2-1b, {describe(plain)}, on {bench.gpu}: {peak / GIB:.2f} GiB at the peak\n")
    print("| with | peak, GiB | saved, GiB | a step takes |\n|---|---|---|---|")
    for changes in SAVES:
        for config in configured(base, EXAMPLE | changes):
            steps, failure = measure(bench.session, config, trace="auto")
            said = " ".join(f"{name}={show_value(value)}" for name, value in changes.items())
            if failure or not steps:
                print(f"| `{said}` | {failure} | | |", flush=True)
                continue
            found = max(step["peak_bytes"] for step in steps)
            seconds = statistics.median(step["seconds"] for step in steps[1:])
            print(f"| `{said}` | {found / GIB:.2f} | {(peak - found) / GIB:.2f} | {seconds * 1e3:.0f} ms |", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--json", type=Path, help="write the rows there, after each of them")
    flags.add_argument("--only", default="", help="configurations whose description contains this")
    flags.add_argument("--markdown", action="store_true", help="what each technique saves on one example")
    given = flags.parse_args(arguments)
    bench = Bench()
    try:
        return markdown(bench) if given.markdown else matrix(bench, given.only, given.json)
    finally:
        bench.close()


if __name__ == "__main__":
    sys.exit(main())
