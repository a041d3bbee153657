"""The GPU of this machine, as predictions need to know it."""

from __future__ import annotations

from pathlib import Path

from .gpus import Gpu
from .libraries_loading import libraries_loading

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""The driver's device files, on Linux and on Windows' Linux."""


def gpu_here() -> Gpu | None:
    """The first GPU that CUDA sees here; None if there is none. Loads torch only where there is a driver."""
    if not any(Path(path).exists() for path in DRIVERS):
        return None
    with libraries_loading():
        import torch
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    threads = found.max_threads_per_multi_processor
    capability = (found.major, found.minor)
    count = torch.cuda.device_count()
    return Gpu(found.name, found.total_memory, capability, found.multi_processor_count, threads, count=count)
