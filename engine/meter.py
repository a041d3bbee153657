"""The gauge's reading, for an engine's own run and for a watched script alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil

from . import nccl
from .events import Gauge, Phase

if TYPE_CHECKING:
    from .device import Nvml
    from .tracing.recorder import Recorder
    from .tracing.tracer import Tracer

LIBRARIES_LOADED = 3
"""Step by which everything that is loaded when it is first used has been used."""


class Meter:
    """Reads the counters of one device.

    Args:
        nvml: None on a CPU.
        total_bytes: Capacity.
    """

    def __init__(self, nvml: Nvml | None, total_bytes: int) -> None:
        self._nvml, self._total_bytes = nvml, total_bytes
        self._context_bytes: int | None = None
        self._nccl_bytes: int | None = None
        self._host: tuple[int | None, int] = (None, 0)
        self._limit_bytes = 0

    def limit(self, limit_bytes: int) -> None:
        """Read a device that behaves as one with so much memory from now on; 0: as it is.

        On a CPU nobody else is on it, and what counts is what the allocator's model holds.
        """
        self._limit_bytes = limit_bytes

    def read(self, time_s: float, recorder: Recorder | None, tracer: Tracer | None, managed_bytes: int) -> Gauge:
        """One reading; NVML's and the allocator's counters are taken at one moment, or taken again."""
        allocated, _, reserved = recorder.counters() if recorder else (0, 0, None)
        process, used = self._process_and_used()
        if self._nvml is not None and recorder and (again := recorder.counters()).reserved_bytes != reserved:
            allocated, _, reserved = again
            process, used = self._process_and_used()
        if self._limit_bytes and self._nvml is None:
            process = used = reserved or 0
        return Gauge(
            time_s=time_s,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            managed_bytes=managed_bytes,
            process_bytes=process,
            device_used_bytes=used,
            device_total_bytes=self._limit_bytes or self._total_bytes,
            phase=tracer.phase_now if tracer else Phase.IDLE,
            step=tracer.step_now if tracer else 0,
            context_bytes=self._context_bytes,
            nccl_bytes=self._nccl_bytes,
            cache=recorder.cache if recorder else None,
            pinned_bytes=self.pinned_bytes(),
        )

    @property
    def context_is_known(self) -> bool:
        """True if it has been measured, or there is none."""
        return self._nvml is None or self._context_bytes is not None

    def measure_context(self, recorder: Recorder) -> bool:
        """Take what this process holds on the device beyond torch's and NCCL's bytes for its context and libraries.

        Returns:
            Whether NVML could tell; True where there is nothing to tell.
        """
        if self._nvml is not None:
            self._nccl_bytes = nccl.held_bytes(self._nvml.device)
            beyond = self.read(0.0, recorder, None, 0).beyond_torch_bytes
            self._context_bytes = None if beyond is None else max(0, beyond - (self._nccl_bytes or 0))
        return self.context_is_known

    def pinned_bytes(self) -> int:
        """Bytes that torch's host allocator has page-locked, cached blocks included; 0 on a CPU."""
        import torch

        statistics: Callable[[], dict[str, Any]] = getattr(torch.cuda, "host_memory_stats", dict)
        return int(statistics().get("allocated_bytes.current", 0)) if self._nvml is not None else 0

    def _process_and_used(self) -> tuple[int | None, int]:
        if self._nvml is not None:
            return self._nvml.process_bytes(), self._nvml.used_bytes()
        with suppress(OSError):  # /proc cannot be opened when all descriptors are in use: it is as it last was
            memory = psutil.virtual_memory()
            self._host = psutil.Process().memory_info().rss, memory.total - memory.available
        return self._host
