"""A script that knows nothing of gpumem-tui: gpumem-tui exec -- python unedited.py"""

import itertools
import sys

import torch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


model = Net()
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else None
for _ in range(steps) if steps else itertools.count():
    with torch.no_grad():
        model(torch.randn(2, 64))  # a forward that trains nothing
    loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 64)), torch.randint(0, 10, (8,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained", steps)
