"""Training on several ranks, each watched: `torchrun --nproc-per-node 2 ranks.py FOLDER CASE...`.

Every rank writes what it has seen to FOLDER/<case>-<rank>.json.
"""

import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.watch import watch

WIDTH, LAYERS, ROWS, STEPS = 32, 3, 4, 4

Prepared = tuple[nn.Module, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def adam(model: nn.Module) -> Prepared:
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def ddp(model: Model, **how: Any) -> Prepared:
    return adam(DistributedDataParallel(model, **how))


def ddp_held(model: Model) -> Prepared:
    """As NCCL does: what a bucket was is held until the next all-reduce begins."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    held: list[torch.Tensor] = []

    def all_reduce(group: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        held[:] = [bucket.buffer()]
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, all_reduce)
    return adam(wrapped)


def fsdp2(model: Model, **how: Any) -> Prepared:
    for layer in model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    return adam(model)


def fsdp1(model: Model, **how: Any) -> Prepared:
    policy = ModuleWrapPolicy({Block})
    return adam(FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **how))


def zero(model: Model, stage: int) -> Prepared:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 200},
        "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    return engine, engine


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

CASES: dict[str, Callable[[Model], Prepared]] = {
    "ddp": ddp,
    "ddp-view": functools.partial(ddp, gradient_as_bucket_view=True),
    "ddp-held": ddp_held,
    "fsdp2": fsdp2,
    "fsdp2-mixed": functools.partial(fsdp2, mp_policy=MIXED),
    "fsdp2-kept": functools.partial(fsdp2, reshard_after_forward=False),
    "fsdp1": fsdp1,
    "fsdp1-original": functools.partial(fsdp1, use_orig_params=True),
    "zero1": functools.partial(zero, stage=1),
    "zero2": functools.partial(zero, stage=2),
    "zero3": functools.partial(zero, stage=3),
}


def train(case: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, optimizer = CASES[case](Model())
    dtype = torch.bfloat16 if case.startswith("zero") else torch.float32
    unwatched = FSDPParamGroup.unshard
    with watch(model, optimizer) as watching:
        for _ in range(STEPS):
            x = torch.randn(ROWS, WIDTH, dtype=dtype)
            loss = model(x).float().square().mean()
            if case.startswith("zero"):
                model.backward(loss)
                model.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            del x, loss
    if case.startswith("zero"):
        model.destroy()
    traces = [] if watching.source.run is None else watching.source.run.traces()
    return {
        "problem": [event.text for event in watching.source.events(0) if event.kind == "refused"],
        "as_it_was": FSDPParamGroup.unshard is unwatched,
        "steps": [seen(Ledger(trace)) for trace in traces],
    }


def seen(ledger: Ledger) -> dict[str, Any]:
    backward = ledger.after(Phase.BACKWARD)
    return {
        "mismatch": ledger.mismatch_bytes,
        "most": {c.key: int(ledger.curve[c].max()) for c in Category},
        "end": {c.key: size for c, size in ledger.end.items()},
        "after_backward": {c.key: size for c, size in (backward or {}).items()},
    }


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    for case in sys.argv[2:]:
        gc.collect()  # a model that FSDP has wrapped goes with its cycles
        (folder / f"{case}-{distributed.get_rank()}.json").write_text(json.dumps(train(case)))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
