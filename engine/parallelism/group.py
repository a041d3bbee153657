"""The process group: that of the job, or one of this process alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from ..config import RunConfig

_meshes: dict[tuple[int, ...], Any] = {}
"""A mesh of several dimensions makes groups, and with them communicators, which stay: one for all runs."""


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
    """Leave the group, and forget the meshes over it."""
    _meshes.clear()
    dist.destroy_process_group()


def join(device: torch.device) -> None:
    """Join the job's group, as the elastic launcher's environment says."""
    dist.init_process_group(backend(device), device_id=device if device.type == "cuda" else None)


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
