"""Two ranks of one job, of which one runs out of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from gpumem_tui.engine.out_of_memory.report import OutOfMemoryReport
from gpumem_tui.engine.run_events import OutOfMemory
from gpumem_tui.engine.watch.watcher import watch

from .runs import outside_bytes
from .scripts import LIMIT, WIDTH
from .timing import measure, report_s

DIES = 1
WITHIN_S = 90.0


def run(folder: Path) -> tuple[OutOfMemoryReport, float]:
    """Run the job; the report of the rank that dies, and how many seconds after the refusal it had it."""
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "STORE": str(folder / "store"),
        }  # fmt: skip
        line = [sys.executable, "-m", __name__, str(folder / f"rank{rank}.json")]
        processes.append(subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL))
    try:
        processes[DIES].wait(WITHIN_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = (folder / f"rank{DIES}.json").read_bytes()
    report, seconds = msgspec.json.decode(told, type=tuple[OutOfMemoryReport, float])
    if report.rank != DIES:
        raise ValueError(f"the report is of rank {report.rank}")
    return report, seconds


def main(target: Path) -> None:
    """One rank."""
    measure()
    rank = int(os.environ["RANK"])
    on_gpu = torch.cuda.device_count() > 1
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend, store = "nccl" if on_gpu else "gloo", f"file://{os.environ['STORE']}"
    torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))).to(device))
    optimizer = torch.optim.AdamW(model.parameters())
    limit = f"{LIMIT + outside_bytes(on_gpu)}B" if rank == DIES else None
    watching = watch(model, optimizer, name=f"oom-bench-rank{rank}", every_step=True, memory_limit=limit)
    try:
        with watching:
            for rows in (256, 256, 40_000):
                optimizer.zero_grad()
                model(torch.ones(rows if rank == DIES else 256, WIDTH, device=device)).sum().backward()
                optimizer.step()
    except torch.OutOfMemoryError:
        told = [event for event in watching.source.events() if isinstance(event, OutOfMemory)]
        target.write_bytes(msgspec.json.encode((told[-1].report, report_s())))
    os._exit(0)  # the other rank is waited for by nobody


if __name__ == "__main__":
    main(Path(sys.argv[1]))
