"""Snapshots as PyTorch writes them, of a real training loop on the CPU: with the frames that it has on a GPU."""

from __future__ import annotations

import sys
import time
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDED = 512
DEEPEST = 60


class Snapshotter(TorchDispatchMode):
    """Keeps a stack for every allocation and free, innermost frame first, as `_record_memory_history` does.

    Attributes:
        entries: As in `device_traces`.
        allocated_bytes: Now.
        peak_bytes: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []
        self.allocated_bytes = self.peak_bytes = 0
        self._alive: dict[int, tuple[int, list[dict[str, Any]], Any]] = {}
        self._frames: dict[tuple[str, int, str], dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive or not size:
            return
        frames = self._stack()
        self._alive[address] = size, frames, weakref.ref(storage, lambda _: self._free(address))
        self.allocated_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        self._tell("alloc", address, size, frames)

    def _free(self, address: int) -> None:
        size, _, _ = self._alive.pop(address)
        self.allocated_bytes -= size
        for action in ("free_requested", "free_completed"):
            self._tell(action, address, size, self._stack())

    def _tell(self, action: str, address: int, size: int, frames: list[dict[str, Any]]) -> None:
        time_us = time.time_ns() // 1000
        self.entries.append(
            {"action": action, "addr": address, "size": size, "stream": 0, "time_us": time_us, "frames": frames}
        )

    def _stack(self) -> list[dict[str, Any]]:
        found, frame = [], sys._getframe(2)
        while frame is not None and len(found) < DEEPEST:
            code = frame.f_code
            if code.co_filename != __file__:
                key = (code.co_filename, frame.f_lineno, code.co_name)
                known = dict(zip(("filename", "line", "name"), key, strict=True))
                found.append(self._frames.setdefault(key, known))
            frame = frame.f_back  # type: ignore[assignment]
        return found

    def snapshot(self) -> dict[str, Any]:
        """Everything so far, with a segment a block."""
        segments = []
        for address, (size, frames, _) in self._alive.items():
            rounded = -(-size // ROUNDED) * ROUNDED
            block = {"address": address, "size": rounded, "requested_size": size, "state": "active_allocated",
                     "frames": frames}  # fmt: skip
            segments.append({"device": 0, "address": address, "total_size": rounded, "stream": 0, "blocks": [block]})
        return {"segments": segments, "device_traces": [[*self.entries]], "allocator_settings": {}}
