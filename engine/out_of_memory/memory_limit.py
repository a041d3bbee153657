"""A device that behaves as one with less memory: would it run on 24 GiB can be tried on 80."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import UserError
from .report import size_text


@contextmanager
def limited(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """Have the CUDA caching allocator get no more than a device with so much memory would have for it now.

    A CPU has no such allocator: there the op tracker counts, and refuses.

    Args:
        device: Which.
        limit_bytes: Of the device that it is to behave like; 0: it stays as it is.

    Raises:
        UserError: What lies outside torch, CUDA's context and other processes, takes all of it.
    """
    if not limit_bytes or device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    if limit_bytes <= outside:
        raise UserError(
            f"--memory-limit {size_text(limit_bytes)}: {size_text(outside)} are taken outside torch already"
        )
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit_bytes - outside) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
