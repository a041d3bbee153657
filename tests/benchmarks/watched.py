"""What watching costs a training loop of one's own: stretches of steps with `watch` and without, in turn.

    python -m tests.benchmarks.watched [--images SIDE] [--profile polyglot-ko-1.3b] [--batch-size 8] [--rounds 30]

One model in one process, each stretch timed as a whole and the ratio taken of
the two without that it lies between; 1.00 means that it costs nothing. On a GPU the default is the
1.3B model, in float16; on a CPU `tiny`, where every operator is followed. `--images`
trains ResNet-50 instead, on pictures of that side and under bfloat16's autocast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from gpumem_tui.profiles import model_profile
from gpumem_tui.watch import watch
from tests.examples.predicted import ResNet50


class Loop(NamedTuple):
    """A loop to watch; `loss` is one forward pass."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]


def language(profile_name: str, rows: int, tokens: int, device: torch.device) -> Loop:
    """A causal language model of a profile."""
    with device:
        config = AutoConfig.for_model(**model_profile(profile_name).config)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        ids = torch.randint(0, config.vocab_size, (rows, tokens))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    return Loop(f"{profile_name}, batch {rows}", model, optimizer, lambda: model(input_ids=ids, labels=ids).loss)


def images(side: int, rows: int, device: torch.device) -> Loop:
    """ResNet-50, as torchvision's reference script trains it."""
    with device:
        model, pixels = ResNet50(), torch.randn(rows, 3, side, side)
        labels = torch.randint(0, 1000, (rows,))

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return functional.cross_entropy(model(pixels), labels)

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Loop(f"ResNet-50, batch {rows} of {side}x{side}", model, optimizer, loss)


def stretch(loop: Loop, steps: int) -> float:
    """Seconds a step."""
    _wait()
    began = time.perf_counter()
    for _ in range(steps):
        loop.loss().backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    _wait()
    return (time.perf_counter() - began) / steps


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(loop: Loop, rounds: int, steps: int) -> tuple[float, list[float]]:
    """Seconds a step without, and by round how many times as long a step takes with it."""
    stretch(loop, 5)
    ratios, alone = [], [stretch(loop, steps)]
    for _ in range(rounds):
        # The first steps are traced whatever they cost; a run is longer than a stretch.
        with watch(loop.model, loop.optimizer):
            stretch(loop, 3)
            watched = stretch(loop, steps)
        alone.append(stretch(loop, steps))
        ratios.append(watched / statistics.mean(alone[-2:]))
    return statistics.median(alone), ratios


def main() -> None:
    """Print the ratio."""
    on_gpu = torch.cuda.is_available()
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--images", type=int, metavar="SIDE", help="pixels: ResNet-50 instead of a language model")
    flags.add_argument("--profile", default="polyglot-ko-1.3b" if on_gpu else "tiny")
    flags.add_argument("--batch-size", type=int)
    flags.add_argument("--seq-len", type=int, default=256)
    flags.add_argument("--rounds", type=int, default=30 if on_gpu else 10)
    flags.add_argument("--steps", type=int, default=30 if on_gpu else 10)
    chosen = flags.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    if chosen.images:
        loop = images(chosen.images, chosen.batch_size or 64, device)
    else:
        loop = language(chosen.profile, chosen.batch_size or 8, chosen.seq_len, device)
    alone_s, ratios = measured(loop, chosen.rounds, chosen.steps)
    ratio = f"{statistics.mean(ratios):.3f} +- {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}"
    print(f"{loop.name}, on {torch.cuda.get_device_name() if on_gpu else 'a CPU'}, torch {torch.__version__}:")
    print(f"{alone_s * 1e3:.1f} ms a step, watched {ratio} times that")
    print(f"median {statistics.median(ratios):.3f} of {len(ratios)}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
