"""Ctrl-C in a watched loop, at any instant: every one must end it.

    python -m tests.benchmarks.watched_interrupts [--tries 200] [--seed 0]

Prints how many were tried and how many were lost. On a GPU the loop runs there.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys

import torch

from gpumem_tui.watch import watch


def interrupted(device: torch.device, after_s: float) -> bool:
    """Whether a loop ends when an interrupt comes after so many seconds."""
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)]).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        with watch(model, optimizer):
            signal.setitimer(signal.ITIMER_REAL, after_s)
            for _ in range(1_000_000):
                model(torch.ones(4, 16, device=device)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0):
                    return _steps_on(model, optimizer, device)
    except KeyboardInterrupt:
        return True
    return False


def _steps_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """The timer has run out: the interrupt comes now, or it was lost."""
    for _ in range(100):
        model(torch.ones(4, 16, device=device)).sum().backward()
        optimizer.step()
    return False


def main() -> int:
    """Try, and print the sums."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--tries", type=int, default=200)
    flags.add_argument("--seed", type=int, default=0)
    chosen = flags.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    dice = random.Random(chosen.seed)
    lost = sum(not interrupted(device, 0.05 + 0.2 * dice.random()) for _ in range(chosen.tries))
    print(f"{chosen.tries} interrupts on {device}: {lost} lost")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
