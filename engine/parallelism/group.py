"""The process group: that of the job, or one of this process alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from ..config import RunConfig

_meshes: dict[tuple[int, ...], Any] = {}
"""A mesh of several dimensions makes groups, and with them communicators, which stay: one for all runs."""
_on_the_host: list[Any] = []
"""The group of `host_group`, once it is made."""
WAITS_FOR = timedelta(days=365)
"""A run may be held, or nothing be run, for as long as somebody likes."""


def grouped(config: RunConfig, device: torch.device) -> AbstractContextManager[None]:
    """Be in a process group for as long as a run lasts that has one: in the job's, or in one of this process alone."""
    if config.text("parallel") == "none" or dist.is_initialized():
        return nullcontext()
    return _alone(device)


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    dist.init_process_group(backend(device), store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if "deepspeed" not in sys.modules:  # which goes on with the group that it was first given
            leave()


def leave() -> None:
    """Leave the group, and forget the others over the same ranks."""
    _meshes.clear()
    _on_the_host.clear()
    dist.destroy_process_group()


def join(device: torch.device) -> None:
    """Join the job's group, as the elastic launcher's environment says."""
    dist.init_process_group(backend(device), device_id=device if device.type == "cuda" else None)


def host_group() -> Any:
    """The gloo group of all ranks, beside the one that trains; made when it is first asked for, by all alike."""
    if not _on_the_host:
        _on_the_host.append(dist.new_group(backend="gloo", timeout=WAITS_FOR))
    return _on_the_host[0]


def let_go_of_barrier(device: torch.device) -> None:
    """Free what the last barrier has left on a GPU; called by all ranks alike.

    Before 2.12 torch keeps the byte that its last barrier was about, for as long as the process lives.

    Args:
        device: Of this rank.
    """
    if device.type == "cuda":
        options = dist.BarrierOptions()
        options.device = torch.device("cpu")  # `dist.barrier` would take the job's own, the GPU, for this group too
        host_group().barrier(opts=options).wait()  # whose byte, kept in place of the other, is on the host


def world_size() -> int:
    """Ranks of the job; 1 for a process that has not joined one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def backend(device: torch.device) -> str:
    """NCCL between GPUs, gloo between processes on a CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def mesh(device_type: str, shard_ranks: Callable[[int], int]) -> Any:
    """All ranks in a row, or rows of replicas of so many ranks each.

    Args:
        device_type: Of the tensors.
        shard_ranks: From the ranks of the job, how many hold one copy of the model.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    shard = shard_ranks(world)
    shape = (world,) if shard == world else (world // shard, shard)
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh(device_type, shape, mesh_dim_names=names)
    return _meshes[shape]
