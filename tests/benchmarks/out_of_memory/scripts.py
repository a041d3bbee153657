"""Watched scripts that run out of memory, each in a way of its own."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpumem_tui.engine.out_of_memory.report import Verdict
from gpumem_tui.engine.watch.watcher import watch

from .runs import outside_bytes

MIB = 1 << 20
WIDTH = 512
LIMIT = 200 * MIB
"""In torch, for what a script makes; on a GPU cuBLAS' workspaces come on top."""


class Script:
    """A model that is trained, and what it is trained with.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        layers = (torch.nn.Linear(WIDTH, WIDTH, device=device) for _ in range(3))
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def rows(self, count: int) -> torch.Tensor:
        """A batch."""
        return torch.ones(count, WIDTH, device=self.device)

    def step(self, count: int = 256) -> torch.Tensor:
        """Train on some rows; returns what the model did."""
        self.optimizer.zero_grad()
        outputs: torch.Tensor = self.model(self.rows(count))
        outputs.sum().backward()
        self.optimizer.step()
        return outputs

    def empty(self, mib: float) -> torch.Tensor:
        """A tensor of so many MiB."""
        return torch.empty(int(mib * MIB), dtype=torch.uint8, device=self.device)


Body = Callable[[Script], object]


def keep_outputs(script: Script) -> None:
    kept = []
    while True:
        kept.append(script.step(2048))


def keep_weights(script: Script) -> None:
    kept = []
    while True:
        script.step()
        kept.append([p.detach().clone() for p in script.model.parameters()])


def keep_graphs(script: Script) -> None:
    kept = []
    while True:
        script.step()
        kept.append(script.model(script.rows(2048)).sum())


def keep_gradients(script: Script) -> None:
    kept = []
    while True:
        script.step()
        kept.append([p.grad.clone() for p in script.model.parameters() if p.grad is not None])


def gaps(each: float, kept_of: int, many: int, asked: float) -> Body:
    """Many blocks in segments of 20 MiB, of which every so-manieth is kept."""

    def body(script: Script) -> None:
        script.step()
        blocks = [script.empty(each) for _ in range(many)]
        kept = blocks[::kept_of]
        del blocks
        script.empty(asked)
        del kept

    return body


def split(script: Script) -> None:
    """One large block is free but for what has been cut off from it."""
    script.step()
    script.empty(140)
    cut = [script.empty(3) for _ in range(14)]
    script.empty(125)
    del cut


def side_stream(cut: float, asked: float) -> Body:
    """As much is free, in the cache of another stream."""

    def body(script: Script) -> None:
        script.step()
        with torch.cuda.stream(torch.cuda.Stream()):
            large = script.empty(150)
            del large
            kept = script.empty(cut)
        script.empty(asked)
        del kept

    return body


def private_pool(script: Script) -> None:
    """As much is free, in a pool that somebody has made."""
    script.step()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        large = script.empty(150)
        del large
        kept = script.empty(8)
    script.empty(120)
    del kept


def too_large(script: Script) -> None:
    script.step()
    script.empty(300)


def outer_product(script: Script) -> None:
    script.step()
    long = torch.ones(9000, 1, device=script.device)
    long @ long.T


def too_many_rows(script: Script) -> None:
    script.step()
    script.rows(150_000)


def evaluate(script: Script) -> None:
    """After two steps the model is evaluated, and all that it returns is kept to be put together."""
    script.step()
    script.step()
    with torch.no_grad():
        torch.cat([script.model(script.rows(8192)) for _ in range(30)])


def smaller_batches(script: Script) -> None:
    """It catches the error, and goes on with half the rows."""
    rows, done = 65_536, 0
    while done < 3:
        try:
            script.step(rows)
            done += 1
        except torch.OutOfMemoryError:
            rows //= 2


@dataclass(frozen=True)
class Watched:
    """A script, and why it is to die."""

    name: str
    body: Body
    expected: Verdict
    gpu_only: bool = False


SCRIPTS = [
    Watched("leak: outputs", keep_outputs, Verdict.GROWN),
    Watched("leak: weights", keep_weights, Verdict.GROWN),
    Watched("leak: graphs", keep_graphs, Verdict.GROWN),
    Watched("leak: gradients", keep_gradients, Verdict.GROWN),
    Watched("gaps: every fifth kept", gaps(4, 5, 30, 90), Verdict.FRAGMENTED),
    Watched("gaps: every second kept", gaps(9, 2, 14, 70), Verdict.FRAGMENTED),
    Watched("gaps: every third kept", gaps(6, 3, 18, 80), Verdict.FRAGMENTED),
    Watched("gaps: a block cut", split, Verdict.FRAGMENTED),
    Watched("side stream", side_stream(8, 120), Verdict.STRANDED, gpu_only=True),
    Watched("side stream, cut in two", side_stream(30, 100), Verdict.STRANDED, gpu_only=True),
    Watched("private pool", private_pool, Verdict.STRANDED, gpu_only=True),
    Watched("too big: a tensor", too_large, Verdict.TOO_BIG),
    Watched("too big: an outer product", outer_product, Verdict.TOO_BIG),
    Watched("too big: a batch", too_many_rows, Verdict.TOO_BIG),
    Watched("evaluation in between", evaluate, Verdict.FULL),
    Watched("caught, smaller batches", smaller_batches, Verdict.FULL),
]


@functools.cache
def workspace_bytes(device: torch.device) -> int:
    """Bytes that cuBLAS keeps: what is left of a watched script of which nothing else is."""
    if device.type != "cuda":
        return 0
    script = Script(device)
    with watch(script.model, script.optimizer, name="oom-bench"):
        script.step()
    del script
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def run(watched: Watched, device: torch.device) -> watch:
    """Run a script to its death; what watched it."""
    script = Script(device)
    limit = LIMIT + outside_bytes(device.type == "cuda") + workspace_bytes(device)
    watching = watch(script.model, script.optimizer, name="oom-bench", every_step=True, memory_limit=f"{limit}B")
    try:
        with watching:
            watched.body(script)
    except torch.OutOfMemoryError as error:
        del error
    return watching
