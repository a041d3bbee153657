"""The peak as a flame for https://www.speedscope.app: category, layer, module, tensor; widths are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ..categories import Category
from ..ledger import Ledger
from .exported_run import ExportedRun, Format, Sink

_SCHEMA = "https://www.speedscope.app/file-format-schema.json"

Stack = tuple[str, ...]
"""Frames from the outside in."""


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """One profile a run."""
    frames: dict[str, int] = {}
    profiles = []
    for run in runs:
        stacks = peak_stacks(run.ledger)
        profiles.append(
            {
                "type": "sampled",
                "name": f"{run.name}: step {run.trace.step}, at its peak",
                "unit": "bytes",
                "startValue": 0,
                "endValue": sum(stacks.values()),
                "samples": [[frames.setdefault(frame, len(frames)) for frame in stack] for stack in stacks],
                "weights": list(stacks.values()),
            }
        )
        sink.write(b"", run.events)
    file: dict[str, Any] = {
        "$schema": _SCHEMA,
        "exporter": "gpumem-tui",
        "name": runs[0].name,
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": frame} for frame in frames]},
        "profiles": profiles,
    }
    sink.write(msgspec.json.encode(file) + b"\n")


FORMAT = Format("speedscope", ".speedscope.json", "the peak as a flame graph: category, layer, module, tensor", write)


def peak_stacks(ledger: Ledger) -> dict[Stack, int]:
    """Bytes at the peak by stack, the largest first within what they share; they sum to the peak."""
    alive = np.flatnonzero(ledger.is_alive(ledger.peak.event))
    blocks = ledger.blocks[alive]
    kinds = np.empty(len(alive), [("category", "i8"), ("name", "i8"), ("made", "i8")])
    kinds["category"] = blocks["category"]
    kinds["name"], kinds["made"] = blocks["name"], ledger.made[alive]
    _, first, which = np.unique(kinds, return_index=True, return_inverse=True)
    stacks: dict[Stack, int] = {}
    for weights, slack in ((blocks["bytes"], False), (blocks["slack"], True)):
        sums = np.zeros(len(first), np.int64)
        np.add.at(sums, which, weights)
        for row, size in zip(first.tolist(), sums.tolist(), strict=True):
            if size:
                stack = _stack(ledger, int(alive[row]), slack)
                stacks[stack] = stacks.get(stack, 0) + size
    whole: dict[Stack, int] = {}
    for stack, size in stacks.items():
        for depth in range(1, len(stack) + 1):
            whole[stack[:depth]] = whole.get(stack[:depth], 0) + size
    order = sorted(stacks, key=lambda stack: [(-whole[stack[:d]], stack[:d]) for d in range(1, len(stack) + 1)])
    return {stack: stacks[stack] for stack in order}


def _stack(ledger: Ledger, row: int, slack: bool) -> Stack:
    """The stack of a block, or of the slack behind it; unknown parts are left out."""
    block, layer = ledger.describe(row), ledger.layers[ledger.blocks["name"][row]]
    category = Category.SLACK if slack else block.category
    owner = block.name if block.name != layer else ""
    tensor = " ".join(filter(None, (block.operator, block.dtype, str(list(block.shape)) if block.shape else "")))
    return (category.info.title, layer or "the model", *filter(None, (owner, tensor)))
