"""NCCL's memory on a GPU, which no statistic of torch's has.

NCCL counts it itself from 2.29.7 on. Before that it is what the process holds more on
the device, and torch's allocator does not, after what makes communicators and after the
first collective of each kind: their functions are wrapped, and measured once for each group.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from .tracing.wrapped_functions import WrappedFunctions, wrap

if TYPE_CHECKING:
    import torch

    from .device import Nvml

DISTRIBUTED = "torch.distributed.distributed_c10d"
DDP = "torch.nn.parallel.distributed"
MAKERS = ("init_process_group", "new_group")
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "all_gather_single",
    "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced", "gather", "scatter", "alltoall", "alltoall_base", "all_to_all_single", "barrier",
)  # fmt: skip
"""Collectives of a `ProcessGroup`, as torch's versions spell them."""


class NcclMemory:
    """The bytes that NCCL has taken in this process, as far as anybody has seen.

    Attributes:
        measured_bytes: By NVML, around what was wrapped; None before anything was.
    """

    def __init__(self) -> None:
        self.measured_bytes: int | None = None
        self._known: set[tuple[Any, str]] = set()
        self._inside = threading.local()

    def held_bytes(self, device: torch.device) -> int | None:
        """Bytes held, by NCCL's own count, or as measured; None: there is no NCCL, or it was there before us.

        Args:
            device: The GPU of this rank.
        """
        distributed = sys.modules.get(DISTRIBUTED)
        if distributed is None or not distributed.is_initialized():
            return None
        groups = [group for group, (backend, _) in list(distributed._world.pg_map.items()) if "nccl" in str(backend)]
        counted = [size for group in groups if (size := _counted(group, device)) is not None]
        if counted:
            return sum(counted)
        return self.measured_bytes if groups else None

    def begins(self, name: str, *args: Any, **kwargs: Any) -> None:
        """A function that may take memory is called, perhaps from within another that does."""
        depth = getattr(self._inside, "depth", 0)
        self._inside.depth = depth + 1
        if depth == 0:
            self._inside.before = None if self._is_known(name, args) else _beyond_torch_bytes(kwargs.get("device_id"))

    def ended(self, name: str, *args: Any) -> None:
        """It has returned; what the process holds more now is NCCL's."""
        self._inside.depth -= 1
        before = self._inside.before if self._inside.depth == 0 else None
        if before is None:
            return
        if name in COLLECTIVES:
            self._known.add((args[0].group_name, name))
        after = _beyond_torch_bytes(None)
        if after is not None:
            self.measured_bytes = (self.measured_bytes or 0) + max(0, after - before)

    def _is_known(self, name: str, args: tuple[Any, ...]) -> bool:
        return name in COLLECTIVES and (args[0].group_name, name) in self._known


memory = NcclMemory()
"""The NCCL memory of this process."""


@contextmanager
def observed() -> Iterator[None]:
    """Measure what NCCL takes, until the context is left."""
    with _functions.heard_by(memory):
        yield


def observe() -> None:
    """Measure what NCCL takes, for as long as this process lives."""
    _lasting.enter_context(observed())


_lasting = ExitStack()


def _wrap_all(undo: ExitStack) -> None:
    distributed = sys.modules.get(DISTRIBUTED)
    if distributed is None or not hasattr(distributed, "ProcessGroup"):  # a torch built without
        return
    places = [(owner, name) for owner in (distributed, sys.modules["torch.distributed"]) for name in MAKERS]
    places += [(distributed.ProcessGroup, name) for name in COLLECTIVES]
    if (parallel := sys.modules.get(DDP)) is not None:
        places.append((parallel.DistributedDataParallel, "__init__"))
    for owner, name in places:
        wrap(undo, owner, name, before=partial(_begins, name), after=partial(_ended, name))


_functions: WrappedFunctions[NcclMemory] = WrappedFunctions(_wrap_all)


def _begins(name: str, *args: Any, **kwargs: Any) -> None:
    with suppress(Exception):  # a measurement that fails is none, and no failure of a collective's
        memory.begins(name, *args, **kwargs)


def _ended(name: str, _result: Any, *args: Any, **_: Any) -> None:
    with suppress(Exception):
        memory.ended(name, *args)


def _counted(group: Any, device: torch.device) -> int | None:
    """NCCL's own count of a group's communicator; None: this NCCL has none, or it is not made yet."""
    with suppress(Exception):
        return int(group._get_backend(device).memory_stats()["total"])
    return None


def _beyond_torch_bytes(device_id: Any) -> int | None:
    """Bytes this process holds on its GPU beyond torch's allocator's; None: it is on no GPU yet.

    Args:
        device_id: A GPU for which a communicator is about to be made: its context, which is not NCCL's,
            is made first.
    """
    import torch

    if device_id is not None and torch.cuda.is_available():
        torch.cuda.mem_get_info(device_id)
    if not torch.cuda.is_initialized():
        return None
    index = torch.cuda.current_device()
    nvml = _nvml(index)
    process = nvml.process_bytes()
    return (nvml.used_bytes() if process is None else process) - torch.cuda.memory_reserved(index)


@cache
def _nvml(index: int) -> Nvml:
    import torch

    from .device import Nvml

    return Nvml(torch.device("cuda", index))
