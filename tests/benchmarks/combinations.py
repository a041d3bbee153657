"""Predicts all pairs and triples of changes of three runs, for `tests/test_advice.py` to hold the search against.

    python -m tests.benchmarks.combinations [NAME ...]     writes tests/data/combinations-NAME.npz

Takes some minutes a run. The values are those that differ in memory: of several that hold the same (sdpa is what
`auto` chooses, fp4 is as large as nf4) one is enough.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig, UserError, Value
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.profiles import run_fields

DATA = Path(__file__).parents[1] / "data"
PHASES = [phase.name.lower() for phase in Phase]
CATEGORIES = [category.key for category in Category]

Changes = Mapping[str, Value]


class Case(NamedTuple):
    """A run, its GPU, and the single changes that are combined."""

    model: str
    gpu: str
    settings: Changes
    changes: tuple[Changes, ...]

    @property
    def config(self) -> RunConfig:
        """The run as it is."""
        return techniques.configure(run_fields(self.model), self.settings)


CASES = {
    "lora": Case(
        "qwen2.5-7b",
        "RTX 3090 24GB",
        {"batch_size": 1, "seq_len": 2048, "lora": True},
        (
            *({"dtype": value} for value in ("float32", "mixed")),
            {"attention": "eager"},
            {"kv_cache": False},
            *({"quantization": value} for value in ("nf4", "int8")),
            {"lora": False},
            *({"checkpointing": value} for value in ("layers", "segments", "input")),
            *({"optimizer": value} for value in ("adamw-fused", "adamw-8bit", "paged-adamw-8bit", "sgd")),
            {"keep_outputs": False},
        ),
    ),
    "full": Case(
        "polyglot-ko-1.3b",
        "L4 24GB",
        {"batch_size": 8},
        (
            {"kv_cache": False},
            {"quantization": "nf4"},
            {"lora": True},
            *({"checkpointing": value} for value in ("layers", "input")),
            *({"optimizer": value} for value in ("adamw-fused", "adamw-8bit", "sgd")),
            {"accumulation": 2, "batch_size": 4},
            {"keep_outputs": False},
        ),
    ),
    "qlora": Case(
        "llama-3.1-8b",
        "RTX 4090 24GB",
        {
            "batch_size": 2,
            "seq_len": 4096,
            "lora": True,
            "quantization": "nf4",
            "checkpointing": "layers",
            "dtype": "bfloat16",
        },
        (
            {"dtype": "mixed"},
            {"attention": "eager"},
            *({"quantization": value} for value in ("none", "int8")),
            {"lora": False},
            *({"checkpointing": value} for value in ("off", "segments", "input")),
            {"optimizer": "adamw-8bit"},
            {"accumulation": 2, "batch_size": 1},
            {"keep_outputs": False},
        ),
    ),
}


def combined(case: Case) -> Iterator[dict[str, Value]]:
    """Every single change, pair and triple of different techniques that can be run; first of all, none."""
    for size in range(4):
        for some in combinations(case.changes, size):
            settings = {name: value for changes in some for name, value in changes.items()}
            if len({next(iter(changes)) for changes in some}) < size:
                continue
            try:
                techniques.check(case.config.with_(settings))
            except UserError:
                continue
            yield settings


def write(name: str, found: Mapping[str, Any]) -> None:
    """Compositions at the highest moment of each phase, by the settings as JSON."""
    table = [[[rows.get(p, {}).get(c, 0) for c in CATEGORIES] for p in PHASES] for rows in found.values()]
    path = DATA / f"combinations-{name}.npz"
    phases, categories = np.array(PHASES), np.array(CATEGORIES)
    settings, sizes = np.array([*found]), np.array(table, np.int64)
    np.savez_compressed(path, settings=settings, bytes=sizes, phases=phases, categories=categories)


def main(names: list[str]) -> None:
    """Predict, and write what was predicted."""
    from gpumem_tui.engine.prediction.predict import predict

    for name in names or CASES:
        case = CASES[name]
        found = {}
        for settings in combined(case):
            predicted = predict(case.config.with_(settings), gpu(case.gpu))
            found[json.dumps(settings, sort_keys=True)] = predicted.by_phase
            sys.stderr.write(f"\r{name}: {len(found)} predicted")
        write(name, found)


if __name__ == "__main__":
    main(sys.argv[1:])
