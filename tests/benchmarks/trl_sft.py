"""TRL's SFTTrainer with its defaults: predicted before, watched while it trains, and how far the two are apart.

    python -m tests.benchmarks.trl_sft [--only polyglot-ko-1.3b:qlora] [--steps 5] [--json FILE]

Full, LoRA and QLoRA of a 1.3B model, LoRA and QLoRA of an 8B model, with random weights that are
written to a folder first; on a CPU a tiny model. Predicted are the presets `trl-sft` and
`trl-sft-qlora`. A line says the peaks, what was unknown or held by the script, and which settings
the script was seen to have that the preset has not; it fails from 1 % on. Needs trl and datasets.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig, UserError, one_line, show
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import StepEnded
from gpumem_tui.engine.watch.leftovers import name_leftovers
from gpumem_tui.engine.watch.watched_source import WatchedSource
from gpumem_tui.profiles import model_profile, preset, run_fields

GIB = 1 << 30
ON_GPU = {"polyglot-ko-1.3b": ("full", "lora", "qlora"), "llama-3.1-8b": ("lora", "qlora")}
ON_CPU = {"tiny": ("full", "lora", "qlora")}
FURTHEST = 0.01
LENGTH = {"tiny": 64}
"""Tokens in a row, where they are not the 1,024 that SFTTrainer cuts them to."""


def main() -> int:
    """Print a line a run."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", default="", help="model:kind")
    flags.add_argument("--steps", type=int, default=5)
    flags.add_argument("--json", type=Path, help="write the rows there, after each of them")
    chosen = flags.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for model, kinds in (ON_GPU if torch.cuda.is_available() else ON_CPU).items():
        wanted = [kind for kind in kinds if chosen.only in f"{model}:{kind}"]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder)
            for kind in wanted:
                rows.append({"run": f"{model}:{kind}"} | row(model, folder, kind, chosen.steps))
                print(told(rows[-1]), flush=True)
                if chosen.json is not None:
                    chosen.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row.get("failure") or abs(row.get("error", 0.0)) > FURTHEST for row in rows))


def save(model: str, folder: str) -> None:
    """Write a model with random weights, in bfloat16 as most are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_profile(model).config), dtype="bfloat16")
    made.save_pretrained(folder)
    del made
    free()


def free() -> None:
    """Give back what the run before has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # which `watch` leaves to the script: it sees what exceeds all before


def expected(model: str, kind: str) -> RunConfig:
    """The preset's run."""
    settings: dict[str, Any] = dict(preset("trl-sft" if kind == "full" else "trl-sft-qlora").settings)
    if kind == "lora":
        settings = {name: value for name, value in settings.items() if not name.startswith("quantization")}
    return techniques.configure(run_fields(model), settings | {"seq_len": LENGTH.get(model, settings["seq_len"])})


def row(model: str, folder: str, kind: str, steps: int) -> dict[str, Any]:
    """Predict a run, and watch it; whatever goes wrong becomes a part of the row."""
    from ..examples import sft_trainer

    config = expected(model, kind)
    try:
        predicted = predict(config, gpu_here() or gpu("H100 80GB"))
        runs, traces = watched(lambda: sft_trainer.from_folder(folder, kind, steps, config.seq_len))
    except Exception as error:
        return {"failure": one_line(error)}
    finally:
        free()
    if not runs:
        return {"failure": "nothing was watched"}
    ledgers = [Ledger(name_leftovers(trace)) for trace in traces if trace.is_complete]
    peak = max(event.peak_bytes or 0 for event in runs[-1].events() if isinstance(event, StepEnded))
    unknown, held = (
        max((int(ledger.curve[category].max()) for ledger in ledgers), default=0)
        for category in (Category.UNKNOWN, Category.HELD_BY_SCRIPT)
    )
    found: dict[str, Any] = {
        "predicted_bytes": max(step.peak_bytes or 0 for step in predicted.document.steps),
        "measured_bytes": peak,
        "unknown_bytes": unknown,
        "held_by_script_bytes": held,
        "mismatch_bytes": max((ledger.mismatch_bytes for ledger in ledgers), default=0),
        "otherwise": otherwise(config, runs[-1].config),
    }
    if torch.cuda.is_available():
        found["error"] = (found["predicted_bytes"] - peak) / peak
        found["bound_holds"] = predicted.safe_bound_bytes >= peak
    return found


def watched(script: Any) -> tuple[list[Run], list[StepTrace]]:
    """The runs and traces that a script has published, ended or not."""
    runs: list[Run] = []
    traces: list[StepTrace] = []
    publish = WatchedSource.publish

    def keep(source: WatchedSource, trace: StepTrace) -> None:
        traces.append(trace)
        if source.run is not None and source.run not in runs:
            runs.append(source.run)
        publish(source, trace)

    WatchedSource.publish = keep  # type: ignore[method-assign, assignment]
    try:
        script()
    finally:
        WatchedSource.publish = publish  # type: ignore[method-assign]
    return runs, traces


def otherwise(config: RunConfig, seen: RunConfig) -> dict[str, str]:
    """Settings that the script was seen to have and the preset has not, of those that decide memory."""
    names = [name for name, option in techniques.all_options().items() if option.affects_memory]
    pairs = {name: (show(config[name]), show(seen[name])) for name in ("batch_size", "seq_len", *names)}
    return {name: f"{there} for {here}" for name, (here, there) in pairs.items() if here != there}


def told(row: dict[str, Any]) -> str:
    """One line for people."""
    if "failure" in row:
        return f"{row['run']:<26} {row['failure'][:160]}"
    figures = f"{row['predicted_bytes'] / GIB:8.3f} GiB predicted, {row['measured_bytes'] / GIB:8.3f} measured"
    if "error" in row:
        figures += f" ({row['error']:+.3%}, bound {'holds' if row['bound_holds'] else 'BROKEN'})"
    exact = "/".join(str(row[f"{name}_bytes"]) for name in ("unknown", "mismatch", "held_by_script"))
    seen = ", ".join(f"{name}={value}" for name, value in row["otherwise"].items()) or "all as in the preset"
    return f"{row['run']:<26}{figures}; unknown/off/held {exact}; seen: {seen}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ImportError, UserError) as error:
        sys.exit(one_line(error))
