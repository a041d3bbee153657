"""A training script that is watched, until its standard input ends: `python -m tests.benchmarks.attacks.victim`."""

from __future__ import annotations

import select
import sys

import torch

from gpumem_tui.watch import watch

NAME = "victim"


def main() -> None:
    """Train, and say how many steps that were."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = 0
    with watch(model, optimizer, name=NAME):
        while not select.select([sys.stdin], [], [], 0)[0]:
            model(torch.randn(8, 16, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    print(f"{steps} steps")


if __name__ == "__main__":
    main()
