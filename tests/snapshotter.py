"""Snapshots as PyTorch writes them, of a real training loop on the CPU: with the frames that it has on a GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch

from gpumem_tui.engine.tracing.op_tracker import OpTracker

ROUNDED = 512
DEEPEST = 60


class Snapshotter(OpTracker):
    """Keeps a stack for every allocation, innermost frame first, as `torch.cuda.memory._record_memory_history` does."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []
        self._frames: dict[tuple[str, int, str], dict[str, Any]] = {}
        self._stacks: dict[int, list[dict[str, Any]]] = {}

    def see(self, tensor: torch.Tensor) -> None:
        before = len(self._rows)
        super().see(tensor)
        self._entries_of(before)

    def _free(self, address: int) -> None:
        before = len(self._rows)
        super()._free(address)
        self._entries_of(before)

    def _entries_of(self, before: int) -> None:
        for at in range(before, len(self._rows), 5):
            address, size, _, _, time_us = self._rows[at : at + 5]
            frames = self._stack()
            common = {"addr": address, "size": abs(size), "stream": 0, "time_us": time_us, "frames": frames}
            if size > 0:
                self._stacks[address] = frames
                self.entries.append({"action": "alloc", **common})
            else:
                self.entries += [{"action": "free_requested", **common}, {"action": "free_completed", **common}]
        del self._rows[before:]

    def _stack(self) -> list[dict[str, Any]]:
        found, frame = [], sys._getframe(2)
        while frame is not None and len(found) < DEEPEST:
            code = frame.f_code
            if "op_tracker" not in code.co_filename and code.co_filename != __file__:
                key = (code.co_filename, frame.f_lineno, code.co_name)
                known = dict(zip(("filename", "line", "name"), key, strict=True))
                found.append(self._frames.setdefault(key, known))
            frame = frame.f_back  # type: ignore[assignment]
        return found

    def snapshot(self) -> dict[str, Any]:
        """Everything so far, with a segment a block."""
        segments = []
        for address, (size, _) in self._alive.items():
            rounded = -(-size // ROUNDED) * ROUNDED
            block = {"address": address, "size": rounded, "requested_size": size, "state": "active_allocated",
                     "frames": self._stacks.get(address, [])}  # fmt: skip
            segments.append({"device": 0, "address": address, "total_size": rounded, "stream": 0, "blocks": [block]})
        return {"segments": segments, "device_traces": [[*self.entries]], "allocator_settings": {}}
