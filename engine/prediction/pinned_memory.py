"""Pinned host memory that a run over fake tensors would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


def taken_bytes(tensor: torch.Tensor) -> int:
    """Bytes that PyTorch's host allocator takes for a tensor: the next power of two."""
    return 1 << max(0, tensor.untyped_storage().nbytes() - 1).bit_length()


class PinnedMemory:
    """Counts tensors made with `pin_memory`, at what PyTorch's host allocator takes.

    Attributes:
        times: How many like it the next one stands for.
        peak_bytes: The most at once; the allocator keeps as much.
    """

    def __init__(self) -> None:
        self.times: Callable[[], int] = lambda: 1
        self.peak_bytes = 0
        self._bytes = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: torch.Tensor) -> None:
        """Count a new tensor for as long as it lives."""
        storage = tensor.untyped_storage()
        size = self.times() * taken_bytes(tensor)
        key = storage._cdata

        def gone(_: weakref.ref[Any]) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
