"""Settings of the CUDA caching allocator: those of the environment, and a run's own while it goes on.

PyTorch reads `PYTORCH_ALLOC_CONF` once, and takes the same words at any time later: what is
allocated from then on follows them. So a run can have its own, and no process is started again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 << 20
"""Requests up to this come from the small pool (kSmallSize)."""
SMALL_SEGMENT_BYTES = 2 << 20
"""The segment that the small pool takes from CUDA (kSmallBuffer)."""


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """The cutting and rounding of blocks.

    Attributes:
        expandable: `expandable_segments`: one segment a pool that grows, instead of many.
        divisions: `roundup_power2_divisions`: sizes between two powers of two; 0: multiples of 512 bytes.
    """

    expandable: bool = False
    divisions: int = 0

    def __str__(self) -> str:
        """The settings as `PYTORCH_ALLOC_CONF` takes them."""
        # PyTorch takes powers of two only: one division is as none.
        return f"expandable_segments:{self.expandable},roundup_power2_divisions:{self.divisions or 1}"

    def rounded_bytes(self, size: int) -> int:
        """Bytes that the allocator's counter moves by for a request, at the least (`round_size`)."""
        if self.divisions > 1 and size > MIN_BLOCK_BYTES * self.divisions:
            floor = 1 << (size.bit_length() - 1)
            step = floor // self.divisions
            return -(-size // step) * step
        return max(MIN_BLOCK_BYTES, -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)

    def rounded_sizes(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The same of many requests, shape (n,)."""
        steps = np.full_like(sizes, MIN_BLOCK_BYTES)
        if self.divisions > 1:
            floors = np.left_shift(1, np.frexp(sizes)[1].astype(np.int64) - 1)
            steps = np.where(sizes > MIN_BLOCK_BYTES * self.divisions, floors // self.divisions, steps)
        rounded: npt.NDArray[np.int64] = np.maximum(MIN_BLOCK_BYTES, -(-sizes // steps) * steps)
        return rounded


def of_environment() -> AllocatorSettings:
    """The settings that PyTorch has been started with."""
    told = next((found for name in VARIABLES if (found := os.environ.get(name))), "").lower().replace(" ", "")
    divisions = re.search(r"roundup_power2_divisions:(\d+)", told)
    return AllocatorSettings("expandable_segments:true" in told, int(divisions[1]) if divisions else 0)


_in_force: list[AllocatorSettings] = []


def in_force() -> AllocatorSettings:
    """The settings that hold now in this process."""
    return _in_force[-1] if _in_force else of_environment()


@contextmanager
def applied(settings: AllocatorSettings, device: torch.device) -> Iterator[None]:
    """Have the allocator follow them, until it is left; does nothing where they are in force, or on a CPU."""
    before = in_force()
    if settings == before or device.type != "cuda":
        yield
        return
    import torch

    torch.cuda.empty_cache()
    _tell(settings)
    _in_force.append(settings)
    try:
        yield
    finally:
        _in_force.pop()
        _tell(before)


def _tell(settings: AllocatorSettings) -> None:
    """PyTorch's function came in with 2.10 under this name."""
    import torch

    names = ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings")
    tell = next(function for name in names if (function := getattr(torch._C, name, None)) is not None)
    tell(str(settings))
