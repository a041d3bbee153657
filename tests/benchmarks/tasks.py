"""Tasks, generation, plain modules, predicted against measured: `python -m tests.benchmarks.tasks [--json FILE]`.

On one GPU, in at most three minutes. Predictions of configurations come from a
process of their own while this one measures; modules are predicted and trained
by the very same functions. What is marked with * is held out: every third. One
case that fails is a line of the table, and ends no other.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import Architecture, RunConfig, UserError, one_line
from gpumem_tui.engine.prediction.any_module import Training, predict
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.gpus import Gpu
from gpumem_tui.engine.prediction.predictor import Predictor
from gpumem_tui.engine.session import Session
from gpumem_tui.profiles import run_fields
from tests.examples import predicted as examples

from .prediction import compare, heading, measure, show, summary

STEPS = 3
STEPS_SKIPPED = 20
"""At the most, by a loss scaler that has yet to find its scale: the optimizer has no state until then."""
HELD_OUT_EVERY = 3
LORA = {"lora": True}
LAYERS = {"checkpointing": "layers"}

RUNS: dict[str, list[dict[str, Any]]] = {
    "bert-base": [
        {"batch_size": 16},
        {"batch_size": 16, "dtype": "mixed"},
        {"batch_size": 32, "seq_len": 128, "task": "sequence-classification"},
        {"batch_size": 16, "task": "token-classification", **LAYERS},
        {"batch_size": 16, "seq_len": 384, "task": "question-answering", "dtype": "bfloat16"},
        {"batch_size": 32, "task": "sequence-classification", **LORA},
        {"batch_size": 8, "seq_len": 512, "optimizer": "adamw-8bit"},
    ],
    "t5-base": [
        {"batch_size": 8},
        {"batch_size": 8, "target_len": 64, "dtype": "mixed"},
        {"batch_size": 8, **LAYERS},
        {"batch_size": 8, "dtype": "bfloat16", **LORA},
        {"batch_size": 4, "seq_len": 512, "target_len": 128, "optimizer": "adafactor"},
    ],
    "bart-base": [
        {"batch_size": 8},
        {"batch_size": 8, "seq_len": 512, "target_len": 128, "dtype": "mixed"},
        {"batch_size": 8, "dtype": "float16", **LAYERS},
        {"batch_size": 16, "seq_len": 128, "kv_cache": False, **LORA},
    ],
    "vit-base": [
        {"batch_size": 32},
        {"batch_size": 64, "dtype": "mixed"},
        {"batch_size": 64, "dtype": "bfloat16", **LAYERS},
        {"batch_size": 16, "image_size": 384, "dtype": "mixed"},
        {"batch_size": 64, **LORA},
        {"batch_size": 32, "optimizer": "sgd-momentum", "attention": "eager"},
    ],
    "whisper-small": [
        {"batch_size": 4, "target_len": 128},
        {"batch_size": 4, "target_len": 64, "dtype": "mixed"},
        {"batch_size": 8, "target_len": 128, "dtype": "bfloat16", **LAYERS},
        {"batch_size": 4, "dtype": "float16", **LORA},
    ],
    "llama-3.2-1b": [
        {"batch_size": 4, "task": "sequence-classification"},
        {"batch_size": 8, "task": "token-classification", "dtype": "mixed", **LORA},
    ],
    "resnet-50": [{"batch_size": 32}, {"batch_size": 64, "dtype": "mixed"}],
    "convnext-tiny": [{"batch_size": 32}, {"batch_size": 32, "dtype": "bfloat16"}],
    "segformer-b0": [{"batch_size": 8, "image_size": 256}],
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet-50": {"model_type": "resnet", "num_labels": 1000},
    "convnext-tiny": {"model_type": "convnext", "num_labels": 1000},
    "segformer-b0": {"model_type": "segformer", "num_labels": 150,
                     "architectures": ["SegformerForSemanticSegmentation"]},
}  # fmt: skip
"""Models without a profile, as transformers' defaults describe them."""

GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama-3.2-1b", {"batch_size": 16, "seq_len": 512, "new_tokens": 256}),
    ("llama-3.2-1b", {"batch_size": 16, "seq_len": 512, "new_tokens": 256, "kv_cache.kind": "static"}),
    ("llama-3.2-1b", {"batch_size": 16, "seq_len": 512, "new_tokens": 256, "kv_cache.kind": "quantized"}),
    ("gpt2", {"batch_size": 32, "seq_len": 256, "new_tokens": 200}),
    ("qwen2.5-0.5b", {"batch_size": 32, "seq_len": 64, "new_tokens": 300, "dtype": "float16"}),
    ("gemma-2-2b", {"batch_size": 4, "seq_len": 256, "new_tokens": 100}),
]

MODULES: dict[str, Callable[[], Training]] = {
    "plain_loop": examples.plain_loop,
    "resnet50": examples.resnet50,
    "resnet50, mixed": partial(examples.resnet50, mixed=True),
    "unet": examples.unet,
    "own_module": examples.own_module,
    "recurrent_cells": examples.recurrent_cells,
    "own_module, not checkpointed": partial(examples.own_module, rows=8, checkpointed=False),
    "lstm_language_model": examples.lstm_language_model,
    "lstm_language_model, mixed": partial(examples.lstm_language_model, mixed=True),
    "gru_encoder": examples.gru_encoder,
}


def configs() -> Iterator[RunConfig]:
    """Every configuration, those of generation last."""
    for model, rows in RUNS.items():
        for row in rows:
            yield _configured(model, {"steps": STEPS} | row)
    for model, row in GENERATIONS:
        yield _configured(model, {"workload": "generate", "steps": row["new_tokens"]} | row)


def _configured(model: str, row: dict[str, Any]) -> RunConfig:
    known = ARCHITECTURES.get(model)
    base = {"model": model, "architecture": Architecture(known, "float32")} if known else run_fields(model)
    return techniques.configure(base, techniques.parse(row, "matrix"))


def of_module(name: str, training: Training, card: Gpu) -> dict[str, Any]:
    """One row of the table: predicted, then trained by the same functions."""
    row: dict[str, Any] = {"config": f"module {name}"}
    try:
        found = predict(*training, gpu=card, name=name)
        torch.cuda.reset_peak_memory_stats()
        model = training.model()
        optimizer = training.optimizer(model)
        for _ in range(STEPS_SKIPPED):
            if optimizer.state:
                break
            training.step(model, optimizer, training.batch())
        for _ in range(STEPS - 1):
            training.step(model, optimizer, training.batch())
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    except Exception as error:  # one case that fails ends no other
        return row | {"failure": one_line(error)}
    return row | {
        "predicted_bytes": found.peak_bytes,
        "measured_bytes": peak,
        "error_percent": 100 * (found.peak_bytes - peak) / peak,
        "predicted_reserved_bytes": found.reserved_bytes,
        "measured_reserved_bytes": reserved,
        "reserved_error_percent": 100 * (found.reserved_bytes - reserved) / reserved,
        "safe_bound_bytes": found.safe_bound_bytes,
        "bound_percent": 100 * (found.safe_bound_bytes - peak) / peak,
        "seconds": found.seconds,
    }


def of_modules(card: Gpu) -> Iterator[dict[str, Any]]:
    """All modules, on this thread and before any engine: cuBLAS keeps a workspace for each thread."""
    for name, make in MODULES.items():
        yield of_module(name, make(), card)  # what a training holds on to, as an average of weights, goes with it
        gc.collect()
        torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def of_configs(card: Gpu) -> Iterator[dict[str, Any]]:
    """All configurations."""
    predictor, session = Predictor(card), Session("cuda")
    try:
        wanted = list(configs())
        predictor.want(wanted)
        for config in wanted:
            try:
                steps, failure = measure(session, config)
            except UserError as error:
                steps, failure = [], str(error)
            while (predicted := predictor.get(config)) is None:
                predictor.wait(1.0)
            yield compare(config, predicted, steps, failure)
    finally:
        predictor.close()
        session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", metavar="FILE", default="tasks.json", help="where the table goes (default: tasks.json)"
    )
    target = Path(parser.parse_args().json)
    card = gpu_here()
    if card is None:
        sys.exit("this needs a GPU: it measures what it predicts")
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    print(heading())
    for kind, some in (("module", of_modules(card)), ("config", of_configs(card))):
        for row in some:
            rows.append(row | {"kind": kind, "held_out": len(rows) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1})
            print(show(rows[-1]), flush=True)
            target.write_text(json.dumps({"gpu": card.name, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    generated = [row for row in rows if "workload=generate" in row["config"]]
    modules = [row for row in rows if row["kind"] == "module"]
    tasks = [row for row in rows if row not in generated and row not in modules]
    held_out = [row for row in rows if row["held_out"]]
    for title, chosen in (
        ("tasks", tasks),
        ("modules", modules),
        ("generation", generated),
        ("held out (*)", held_out),
    ):
        summary(title, chosen)
    print(f"{sum('failure' in row for row in rows)} of {len(rows)} failed; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
