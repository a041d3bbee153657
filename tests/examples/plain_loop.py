"""A plain PyTorch loop, watched: one import, one `with`. In another terminal: gpumem-tui attach"""

import sys

import torch
from torch.nn import functional

from gpumem_tui.watch import watch


def main(steps: int) -> list[float]:
    torch.manual_seed(0)
    layers = [torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True) for _ in range(2)]
    model = torch.nn.Sequential(torch.nn.Embedding(100, 32), *layers, torch.nn.Linear(32, 100))
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    with watch(model, optimizer):
        for _ in range(steps):
            ids = torch.randint(0, 100, (4, 16))
            scores = model(ids)
            loss = functional.cross_entropy(scores.flatten(0, 1), ids.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
