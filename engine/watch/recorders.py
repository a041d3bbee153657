"""The recorders of allocations for a process that was there before we were."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from ..tracing.allocator_trace import AllocatorTrace
from ..tracing.op_tracker import OpTracker
from .fault_barrier import FaultBarrier


class LateAllocatorTrace(AllocatorTrace):
    """The allocator's trace on a device that has been in use.

    The libraries' workspaces are given back and taken again: those are the
    blocks that are there afterwards and were not before.
    """

    def __init__(self, device: torch.device) -> None:
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        before = {
            block["address"]
            for segment in torch._C._cuda_memorySnapshot(None)["segments"]
            for block in segment["blocks"]
            if block["state"] != "inactive"
        }
        super().__init__(device)
        self.workspaces = tuple(address for address in self.workspaces if address not in before)


class GuardedOpTracker(OpTracker):
    """The op tracker in somebody's loop: operators run whatever becomes of us."""

    def __init__(self, barrier: FaultBarrier) -> None:
        super().__init__()
        self._barrier = barrier
        self._entered = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; look at what it returns if all is well with us."""
        out = func(*args, **(kwargs or {}))
        if not self._barrier.off:
            try:
                for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
                    if isinstance(leaf, torch.Tensor):
                        self.see(leaf)
            except Exception as error:
                self._barrier.failed(error)
        return out

    def begin(self) -> None:
        """See this thread's operators from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]
        self._entered = True

    def end(self) -> bool:
        """Stop seeing them; False if a mode of the script's lies on top, which has to go first."""
        if self._entered and _get_current_dispatch_mode() is self:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._entered = False
        return not self._entered
