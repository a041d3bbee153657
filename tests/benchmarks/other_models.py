"""Models that nobody has looked at: predicted against measured, on a GPU.

    python -m tests.benchmarks.other_models [FILE]

Architectures that have no profile and that the prediction was not written by,
with the layers' shapes of published models, some of them made smaller. Each is
trained fully, and with LoRA on all linear layers and checkpointing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import Architecture, RunConfig, UserError
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.session import Session

from .prediction import STEPS, compare, heading, measure, show, summary

MODELS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

RUNS: list[dict[str, Any]] = [
    {"batch_size": 4},
    {"batch_size": 4, "seq_len": 512, "lora": True, "lora.targets": "all-linear", "checkpointing": "layers"},
]


def config_of(name: str, settings: dict[str, Any]) -> RunConfig:
    """A run of one of the models."""
    base = {"model": name, "architecture": Architecture(MODELS[name], "bfloat16")}
    return techniques.configure(base, techniques.parse({"steps": STEPS} | settings, "runs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default="other_models.json")
    target = Path(parser.parse_args().file)
    info = gpu_here()
    if info is None:
        sys.exit("this needs a GPU: it measures what it predicts")
    session = Session("cuda")
    rows = []
    print(heading())
    for name in MODELS:
        for settings in RUNS:
            config = config_of(name, settings)
            try:
                predicted: Prediction | UserError = predict(config, info)
            except UserError as error:
                predicted = error
            rows.append(compare(config, predicted, *measure(session, config)) | {"held_out": True})
            print(show(rows[-1]), flush=True)
            target.write_text(json.dumps({"gpu": info.name, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    session.close()
    summary("all", rows)


if __name__ == "__main__":
    main()
