"""Does every byte have a name, at every event? One line a configuration.

    python -m tests.benchmarks.exactness [--quick]

On a GPU: polyglot-ko-1.3b, llama-3.2-1b and qwen2.5-0.5b; without one: tiny.
Columns: events of all traced steps; the most bytes unknown at any event; the
difference between the ledger's sums and the allocator's own counters (at the
end and at the peak of every step, the worst of them); the peak; recomputes
expected and seen; bytes leaked. All differences should be 0.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import replace
from typing import Any

import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.feed import Start
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.run_events import OutOfMemory, Recomputed, Refused, RunEnded, RunFailed
from gpumem_tui.engine.session import Session
from gpumem_tui.profiles import model_profile, run_fields

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": "on"},
    "qlora": {"lora": "on", "quantization": "nf4"},
    "int8": {"lora": "on", "quantization": "int8"},
}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "off": {},
    "layers": {"checkpointing": "layers"},
    "every4": {"checkpointing": "segments", "checkpointing.every": 4},
    "reentr": {"checkpointing": "layers", "checkpointing.reentrant": "on"},
}
DTYPES = ("float16", "bfloat16", "float32", "mixed")
OPTIMIZERS = ("adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit")


def matrix(models: list[str], on_gpu: bool) -> list[tuple[str, dict[str, Any]]]:
    """A subset of the product in which every pair of values meets: a walk through it in co-prime strides."""
    rows = []
    axes = list(itertools.product(METHODS, CHECKPOINTING))
    for m, model in enumerate(models):
        for i, (method, checkpointing) in enumerate(axes):
            dtype = DTYPES[(i + i // len(DTYPES) + m) % len(DTYPES)]
            optimizer = OPTIMIZERS[(i // 2 + m) % len(OPTIMIZERS)]
            if optimizer.startswith("paged") and not on_gpu:
                optimizer = "adamw-fused"
            settings = METHODS[method] | CHECKPOINTING[checkpointing]
            settings |= {"dtype": dtype, "optimizer": optimizer, "accumulation": (1, 4)[(i + m) % 2]}
            rows.append((model, settings))
    return rows


class Check:
    """Compares each trace with the allocator's counters."""

    def __init__(self) -> None:
        self.events = self.unknown = self.mismatch = self.peak = 0
        self.where = ""

    def __call__(self, trace: StepTrace) -> None:
        if trace.counted is None:
            return
        ledger = Ledger(trace)
        self.events += len(trace.events)
        worst = int(ledger.curve[Category.UNKNOWN].max())
        if worst > self.unknown:
            event = int(ledger.curve[Category.UNKNOWN].argmax()) - 1
            blocks = [b for b in ledger.largest(event, 10_000) if b.category is Category.UNKNOWN]
            self.where = f"step {trace.step}: " + ", ".join(f"{b.bytes} {b.name} {b.phase.title}" for b in blocks[:4])
        self.unknown = max(self.unknown, worst)
        if trace.step:
            self.peak = max(self.peak, ledger.peak.bytes)
        self.mismatch = max(self.mismatch, ledger.mismatch_bytes, ledger.unmatched_frees)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 if nothing is off."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--quick", action="store_true", help="every fourth configuration")
    quick = flags.parse_args(arguments).quick
    on_gpu = torch.cuda.is_available()
    models = ["polyglot-ko-1.3b", "llama-3.2-1b", "qwen2.5-0.5b"] if on_gpu else ["tiny"]
    small = {"batch_size": 4, "seq_len": 256} if on_gpu else {"batch_size": 2, "seq_len": 16}
    check = Check()
    session = Session("auto", lambda trace: check(trace))  # noqa: PLW0108 (check is another one every row)
    bad = 0
    print(f"{'configuration':<74}{'events':>8}{'unknown':>9}{'off':>9}{'peak GiB':>10}{'recomputes':>12}{'leaked':>7}")
    for model, settings in matrix(models, on_gpu)[:: 4 if quick else 1]:
        parsed = techniques.parse(settings | small | {"steps": 3}, "matrix")
        config = replace(techniques.configure(run_fields(model), parsed), trace="every")
        check = Check()
        before = len(session.events(0))
        session.command(Start(config))
        session.wait()
        events = list(session.events(0))[before:]
        size = {"off": 0, "layers": 1}.get(config.text("checkpointing"), config.integer("checkpointing.every"))
        layers = model_profile(model).config["num_hidden_layers"]
        expected = math.ceil(layers / size) * 3 * config.integer("accumulation") if size else 0
        seen = sum(isinstance(m, Recomputed) for m in events)
        failed = [m.text for m in events if isinstance(m, RunFailed | OutOfMemory | Refused)]
        leaked = sum(m.leaked_bytes or 0 for m in events if isinstance(m, RunEnded))
        label = f"{model} " + " ".join(str(v) for v in settings.values() if v != "on")
        print(
            f"{label:<74}{check.events:>8}{check.unknown:>9}{check.mismatch:>9}"
            f"{check.peak / 2**30:>10.3f}{f'{expected}={seen}' if expected == seen else f'{expected}!={seen}':>12}"
            f"{leaked:>7}",
            flush=True,
        )
        for line in failed or ([check.where] if check.where else []):
            print(f"    {line[:160]}")
        bad += bool(failed or check.unknown or check.mismatch or leaked or expected != seen)
    session.close()
    print(f"{bad} configurations are off")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
