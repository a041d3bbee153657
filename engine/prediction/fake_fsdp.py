"""FSDP2 on the modelled device: the installed `fully_shard` itself, over fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fully_shard
from torch.utils._python_dispatch import _disable_current_modes

from .cuda_patches import replace
from .fake_cuda import DEVICE, FakeCuda


@contextmanager
def fsdp_paths(tracker: FakeCuda) -> Iterator[None]:
    """Have `fully_shard` shard onto the modelled device, and the tracker see storages that it resizes.

    A storage is resized without an operator: no dispatch mode hears of it.

    Args:
        tracker: The recorder.
    """

    def seen(resize: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        def call(tensor: torch.Tensor) -> None:
            resize(tensor)
            tracker.see(tensor)

        return call

    slice_mesh = DeviceMesh.__getitem__

    def sliced(mesh: DeviceMesh, names: Any) -> DeviceMesh:
        with _disable_current_modes():  # it looks up this rank in a table
            return slice_mesh(mesh, names)

    alloc, free = seen(_fsdp_param.alloc_storage), seen(_fsdp_param.free_storage)
    with ExitStack() as undo:
        replace(undo, DeviceMesh, "__getitem__", sliced)
        replace(undo, _fully_shard, "_get_device_from_mesh", lambda _mesh: DEVICE)
        replace(undo, _fsdp_param, "alloc_storage", alloc)
        replace(undo, _fsdp_param, "free_storage", free)
        replace(undo, _fsdp_param_group, "alloc_storage", alloc)
        yield
