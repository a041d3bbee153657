"""What watching costs a training loop of one's own: stretches of steps with `watch` and without, in turn.

    python -m tests.benchmarks.watched [--profile polyglot-ko-1.3b] [--batch-size 8] [--rounds 10] [--steps 20]

One model in one process, each stretch timed as a whole and the ratio taken of
neighbours; 1.00 means that it costs nothing. On a GPU the default profile is
the 1.3B model, in float16; on a CPU `tiny`, where every operator is followed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpumem_tui.profiles import model_profile
from gpumem_tui.watch import watch


def stretch(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, steps: int) -> float:
    """Seconds a step."""
    _wait(ids)
    began = time.perf_counter()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(ids)
    return (time.perf_counter() - began) / steps


def _wait(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def main() -> int:
    """Print the ratio."""
    on_gpu = torch.cuda.is_available()
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--profile", default="polyglot-ko-1.3b" if on_gpu else "tiny")
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--seq-len", type=int, default=256)
    flags.add_argument("--rounds", type=int, default=10)
    flags.add_argument("--steps", type=int, default=60 if on_gpu else 10)
    chosen = flags.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    profile = model_profile(chosen.profile)
    with device:
        config = AutoConfig.for_model(**profile.config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16 if on_gpu else torch.float32)
        ids = torch.randint(0, config.vocab_size, (chosen.batch_size, chosen.seq_len))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    stretch(model, optimizer, ids, 5)
    ratios, alone = [], []
    for _ in range(chosen.rounds):
        alone.append(stretch(model, optimizer, ids, chosen.steps))
        # The first two steps are traced whatever they cost; a run is longer than a stretch.
        with watch(model, optimizer):
            stretch(model, optimizer, ids, 3)
            ratios.append(stretch(model, optimizer, ids, chosen.steps) / alone[-1])
    print(f"{chosen.profile}, batch {chosen.batch_size}, on {device}: {statistics.median(alone) * 1e3:.1f} ms a step,")
    print(f"watched {statistics.median(ratios):.3f} times that (median of {len(ratios)} pairs)")
    print("pairs: " + " ".join(f"{ratio:.3f}" for ratio in sorted(ratios)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
