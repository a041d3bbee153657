"""A script of several ranks that knows nothing of gpumem-tui: gpumem-tui exec -- torchrun ... unedited_ranks.py FILE"""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

distributed.init_process_group("gloo")
rank, stop = distributed.get_rank(), Path(sys.argv[1])
model = DistributedDataParallel(torch.nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
over = torch.zeros(1)
while not over.item():
    loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 64)), torch.randint(0, 10, (8,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    over += stop.exists()
    distributed.all_reduce(over, distributed.ReduceOp.MAX)
if rank == 0:
    print("trained on", distributed.get_world_size(), "ranks")
distributed.destroy_process_group()
sys.exit(int(stop.read_text()))
