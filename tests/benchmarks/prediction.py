"""Predicted against measured, on a GPU: `python -m tests.benchmarks.prediction [FILE]`.

Predicts and runs every configuration of a matrix and prints configuration,
predicted, measured and error, for the peak and for what the allocator reserves;
the same goes to FILE as JSON. What is marked with * comes after the first SEEN
configurations of its model, those whose traces the prediction was written by.
Predictions come from a process of their own while this one measures; between runs the allocator's cache is emptied.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.predictor import Answer, Predictor
from gpumem_tui.engine.run_events import OutOfMemory, RunFailed, StepEnded
from gpumem_tui.engine.session import Session
from gpumem_tui.engine.techniques import describe
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.commands.common import run_to_end

GIB = 2**30
STEPS = 3
QLORA = {"lora": True, "quantization": "nf4"}
LAYERS = {"checkpointing": "layers"}

MATRIX: dict[str, list[dict[str, Any]]] = {
    "polyglot-ko-1.3b": [
        {"batch_size": 16},
        {"batch_size": 8, "optimizer": "adamw-fused"},
        {"batch_size": 8, "dtype": "mixed"},
        {"batch_size": 4, "seq_len": 512, "dtype": "float32"},
        {"batch_size": 2, "seq_len": 1024, "attention": "eager"},
        {"batch_size": 16, "lora": True},
        {"batch_size": 8, **QLORA, **LAYERS, "accumulation": 4},
        {"batch_size": 8, "lora": True, "quantization": "int8"},
        {"batch_size": 8, "optimizer": "paged-adamw-8bit"},
        {"batch_size": 16, "checkpointing": "segments", "checkpointing.every": 4},
        {"batch_size": 6, "seq_len": 384, "optimizer": "adafactor"},
        {"batch_size": 8, "kv_cache": False, "keep_outputs": False},
        {"batch_size": 8, **QLORA, "quantization.double": False, "lora.targets": "all-linear"},
    ],
    "llama-3.2-1b": [
        {"batch_size": 4, "seq_len": 512},
        {"batch_size": 8, "dtype": "mixed", **LAYERS},
        {"batch_size": 8, "seq_len": 512, **QLORA},
        {"batch_size": 4, "seq_len": 1024, **QLORA, **LAYERS},
        {"batch_size": 2, "seq_len": 1024, "dtype": "float32", "optimizer": "adamw-fused"},
        {"batch_size": 4, "accumulation": 4, "optimizer": "adamw-8bit"},
        {"batch_size": 4, "attention": "eager", "dtype": "float16"},
        {"batch_size": 3, "seq_len": 777, "lora": True, "lora.r": 64},
        {"batch_size": 8, "optimizer": "sgd-momentum", "checkpointing": "input"},
        {"batch_size": 2, "seq_len": 2048, "dtype": "mixed", "checkpointing.reentrant": True, **LAYERS},
    ],
    "qwen2.5-0.5b": [
        {"batch_size": 8, "seq_len": 512},
        {"batch_size": 16, "seq_len": 512, "lora": True, **LAYERS},
        {"batch_size": 8, **QLORA},
        {"batch_size": 8, "lora": True, "quantization": "int8", **LAYERS},
        {"batch_size": 2, "seq_len": 2048, "checkpointing": "segments", "checkpointing.every": 4},
        {"batch_size": 4, "dtype": "mixed"},
        {"batch_size": 32, "seq_len": 128, "optimizer": "sgd"},
        {"batch_size": 2, "attention": "eager", "lora": True},
    ],
    "gpt2": [
        {"batch_size": 8, "seq_len": 512},
        {"batch_size": 8, "dtype": "mixed"},
        {"batch_size": 16, "seq_len": 1024, "dtype": "bfloat16", **LAYERS},
        {"batch_size": 4, "optimizer": "adamw-fused", "attention": "eager"},
        {"batch_size": 16, "lora": True},
        {"batch_size": 8, **QLORA},
        {"batch_size": 24, "seq_len": 320, "dtype": "float16", "optimizer": "adamw-single"},
    ],
    "gemma-2-2b": [
        {"batch_size": 2, "dtype": "bfloat16", "attention": "eager"},
        {"batch_size": 4, "lora": True, "attention": "eager"},
        {"batch_size": 2, **QLORA, **LAYERS, "attention": "eager", "dtype": "bfloat16"},
    ],
    "phi-3-mini": [
        {"batch_size": 4, "lora": True},
        {"batch_size": 4, **QLORA, **LAYERS},
        {"batch_size": 2, "seq_len": 512, "optimizer": "adamw-8bit", **LAYERS},
    ],
    "llama-3.1-8b": [
        {"batch_size": 4, "lora": True, **LAYERS},
        {"batch_size": 4, **QLORA},
        {"batch_size": 1, "optimizer": "adamw-8bit", **LAYERS},
    ],
    "mistral-7b": [{"batch_size": 2, "seq_len": 512, "lora": True}, {"batch_size": 1, "seq_len": 2048, **QLORA}],
}


SEEN = {
    "polyglot-ko-1.3b": 10, "llama-3.2-1b": 7, "qwen2.5-0.5b": 5, "gpt2": 4, "gemma-2-2b": 0, "phi-3-mini": 2,
    "llama-3.1-8b": 3, "mistral-7b": 1,
}  # fmt: skip
"""How many of a model's configurations the prediction was written by; the others are held out."""


def configs() -> list[tuple[RunConfig, bool]]:
    """The matrix, and whether a configuration was held out."""
    made = []
    for model, rows in MATRIX.items():
        for index, row in enumerate(rows):
            settings = techniques.parse({"steps": STEPS} | row, "matrix")
            made.append((techniques.configure(run_fields(model), settings), index >= SEEN[model]))
    return made


def measure(session: Session, config: RunConfig, trace: str = "auto") -> tuple[list[dict[str, Any]], str | None]:
    """Run it; returns its steps, and why it failed, if it did."""
    events = run_to_end(session, dataclasses.replace(config, trace=trace)).events()
    failures = [event.text for event in events if isinstance(event, RunFailed | OutOfMemory)]
    return [event.figures() for event in events if isinstance(event, StepEnded)], failures[0] if failures else None


def compare(config: RunConfig, predicted: Answer, steps: list[dict[str, Any]], failure: str | None) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"config": describe(config)}
    if failure or not steps or isinstance(predicted, UserError):
        return row | {"failure": failure or str(predicted)}
    peak = max(step["peak_bytes"] for step in steps)
    reserved = steps[-1]["reserved_bytes"]
    # Of the steps, as it is measured: loading may take more.
    expected = max(step.peak_bytes or 0 for step in predicted.document.steps)
    return row | {
        "predicted_bytes": expected,
        "measured_bytes": peak,
        "error_percent": 100 * (expected - peak) / peak,
        "predicted_reserved_bytes": predicted.reserved_bytes,
        "measured_reserved_bytes": reserved,
        "reserved_error_percent": 100 * (predicted.reserved_bytes - reserved) / reserved,
        "safe_bound_bytes": predicted.safe_bound_bytes,
        "bound_percent": 100 * (predicted.safe_bound_bytes - peak) / peak,
        "seconds": predicted.seconds,
    }


def heading() -> str:
    """Of the columns that `show` fills."""
    return f"{'GiB':<92}{'predicted':>10}{'measured':>10}{'error %':>9}{'reserved %':>11}{'bound %':>9}{'s':>7}"


def show(row: dict[str, Any]) -> str:
    """One line for people."""
    name = f"{'*' if row['held_out'] else ' '} {row['config']}"
    if "failure" in row:
        return f"{name:<92} {row['failure']}"
    return (
        f"{name:<92}{row['predicted_bytes'] / GIB:>10.3f}{row['measured_bytes'] / GIB:>10.3f}"
        f"{row['error_percent']:>9.3f}{row['reserved_error_percent']:>11.3f}{row['bound_percent']:>9.2f}"
        f"{row['seconds']:>7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default="prediction.json")
    target = Path(parser.parse_args().file)
    info = gpu_here()
    if info is None:
        sys.exit("this needs a GPU: it measures what it predicts")
    predictor, session = Predictor(info), Session("cuda")
    matrix = configs()
    predictor.want([config for config, _ in matrix])
    rows = []
    print(heading())
    try:
        for config, held_out in matrix:
            steps, failure = measure(session, config)
            while (predicted := predictor.get(config)) is None:
                predictor.wait(1.0)
            rows.append(compare(config, predicted, steps, failure) | {"held_out": held_out})
            print(show(rows[-1]), flush=True)
            target.write_text(json.dumps({"gpu": info.name, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    finally:
        predictor.close()
        session.close()
    for title, chosen in (("all", rows), ("held out (*)", [row for row in rows if row["held_out"]])):
        summary(title, chosen)


def summary(title: str, rows: list[dict[str, Any]]) -> None:
    """One line over all that could be compared."""
    rows = [row for row in rows if "error_percent" in row]
    if not rows:
        return
    errors = [abs(row["error_percent"]) for row in rows]
    reserved = [abs(row["reserved_error_percent"]) for row in rows]
    under = sum(row["bound_percent"] < 0 for row in rows)
    print(
        f"{title}: {len(rows)} configurations; peak: median {statistics.median(errors):.3f} %, at most "
        f"{max(errors):.3f} %; reserved: median {statistics.median(reserved):.3f} %, at most {max(reserved):.3f} %; "
        f"the safe bound was too low {under} times"
    )


if __name__ == "__main__":
    main()
