"""The recorders of allocations for a process that was there before we were."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from ..tracing.allocator_trace import AllocatorTrace
from ..tracing.op_tracker import OpTracker
from ..tracing.storages import is_fake, parts_of
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
        self.workspaces = {address: name for address, name in self.workspaces.items() if address not in before}


class GuardedOpTracker(OpTracker):
    """The op tracker in somebody's loop: operators run whatever becomes of us."""

    def __init__(self, barrier: FaultBarrier, memory_limit_bytes: int = 0) -> None:
        super().__init__(memory_limit_bytes=memory_limit_bytes)
        self._barrier = barrier
        self._entered = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let regions that the script compiles be compiled, and see of them what they return."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; look at what it returns if all is well with us.

        Raises:
            torch.OutOfMemoryError: It is more than the memory limit leaves.
        """
        out = func(*args, **(kwargs or {}))
        if not self._barrier.off:
            try:
                self.look(func, out)
            except torch.OutOfMemoryError:
                del out  # the error holds this frame
                raise
            except Exception as error:
                self._barrier.failed(error)
        return out

    def _see(self, tensor: torch.Tensor, forced: bool = False) -> None:
        if not is_fake(tensor):
            super()._see(tensor, forced)

    def begin(self, there: Iterable[torch.Tensor]) -> None:
        """See this thread's operators from now on.

        Args:
            there: Made before, so that no operator returns them: counted now, and not when they are first named.
        """
        for tensor in there:
            for part in parts_of(tensor):
                self.address(part)
        self.__enter__()  # type: ignore[no-untyped-call]
        self._entered = True

    def end(self) -> bool:
        """Stop seeing them, whatever modes of the script's lie on top.

        Returns:
            False if this is not on the thread's stack now: another thread's, or
            in the middle of an operator.
        """
        if not self._entered:
            return True
        stack = _python_dispatch._get_current_dispatch_mode_stack()
        position = next((i for i, mode in enumerate(stack) if mode is self), None)
        if position is None:
            return False
        above = stack[position + 1 :]
        if above:
            _take_from_beneath(self, above)
        else:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._entered = False
        return True


def _take_from_beneath(tracker: TorchDispatchMode, above: list[TorchDispatchMode]) -> None:
    """Take a mode off the stack and leave those above it there.

    Each mode has noted what was so before it; the one above is given what ours has noted.
    """
    for _ in above:
        _python_dispatch._pop_mode()
    _python_dispatch._pop_mode()
    for mode in above:
        _python_dispatch._push_mode(mode)
    for name, noted in vars(tracker).items():
        theirs = vars(above[0]).get(name)
        if name.startswith("old_") and isinstance(noted, list | deque) and noted and theirs:
            theirs[-1] = noted.pop()
