"""Readings of the device: every number with its source.

NVML counts whole-device bytes of all processes; the caching allocator counts
its own; CUDA managed memory (paged optimizers) is in neither of torch's counters.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from .config import UserError
from .events import Environment
from .techniques import registry

PACKAGES = ("torch", "transformers", "accelerate", "textual", "nvidia-ml-py")
"""Packages that every run is made of; techniques name their own."""


def packages() -> tuple[str, ...]:
    """Every distribution whose version matters."""
    return (*PACKAGES, *sorted({name for technique in registry().values() for name in technique.packages}))


def select(wanted: str) -> torch.device:
    """The device a run asks for: `auto`, `cpu`, `cuda`, `cuda:<i>`.

    Raises:
        UserError: A GPU is asked for where there is none, or an unknown name.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    name, _, index = wanted.partition(":")
    if name != "cuda" or (index and not index.isdigit()):
        raise UserError(f"--device {wanted}: takes auto, cpu, cuda or cuda:<number>")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise UserError(f"--device {wanted}: this machine has {count} CUDA GPU{'' if count == 1 else 's'}")
    return torch.device("cuda", int(index or 0))


def leave_a_core() -> None:
    """Have the calling thread compute on all of this machine's cores but one, unless OMP_NUM_THREADS says otherwise.

    An operator waits for the slowest of its threads. Were there one on every
    core, each short wait for a core that draws the screen would hold up all.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - 1)))


def memory_total_bytes(device: torch.device) -> int:
    """Capacity: the CUDA runtime's figure, or the machine's RAM."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def memory_for_a_run_bytes(device: torch.device) -> int:
    """The most bytes a run could have: the GPU's capacity, or the RAM that is available now."""
    return memory_total_bytes(device) if device.type == "cuda" else int(psutil.virtual_memory().available)


def installed_packages() -> dict[str, str]:
    """Versions of what matters here; what is missing is left out."""
    changed = tuple(folder.stat().st_mtime_ns for folder in map(Path, sys.path) if folder.is_dir())
    return dict(_versions(packages(), (*sys.path, *changed)))


@lru_cache(1)
def _versions(names: tuple[str, ...], where: tuple[str | int, ...]) -> dict[str, str]:
    """Versions by name; they are read again where a folder of `sys.path` has changed, as installing makes it."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> Environment:
    """The environment that this machine is."""
    capability = driver = None
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = Nvml(device).driver
    return Environment(
        device=str(device),
        device_name=f"CPU {name}, {os.cpu_count()} cores" if device.type == "cpu" else name,
        device_total_bytes=memory_total_bytes(device),
        capability=capability,
        driver=driver,
        packages=installed_packages(),
        python=platform.python_version(),
        gpus=torch.cuda.device_count() if device.type == "cuda" else 1,
        host_bytes=int(psutil.virtual_memory().total),
        host=platform.node(),
    )


class Nvml:
    """NVML for one CUDA device; every answer is None where NVML has none.

    The device is found by UUID, since CUDA_VISIBLE_DEVICES renumbers CUDA's
    devices and not NVML's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._handle: Any = None
        self.driver: str | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except Exception:  # no library, no driver, no such device: readings stay None
            self._handle = None

    def used_bytes(self) -> int:
        """Bytes used on the device by everybody; without NVML the CUDA runtime's figure."""
        if self._handle is not None:
            for version in (self._nvml.nvmlMemory_v2, None):  # the first counts the driver's own reserve apart
                with suppress(self._nvml.NVMLError):
                    return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version).used)
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    def process_bytes(self) -> int | None:
        """Bytes used by this process; None in containers, where NVML sees no pids."""
        if self._handle is None:
            return None
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        mine = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        return int(mine[0]) if mine and mine[0] is not None else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
