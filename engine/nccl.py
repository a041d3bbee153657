"""NCCL's memory on a GPU, which no statistic of torch's has: its communicators' buffers, as NCCL itself tells.

From 2.29.7 on it counts them. Its log has told of every allocation for longer, and is asked for where no count
can be had. NVML cannot tell: around a first collective the kernels that it needs are loaded too, NCCL's and
others', 290 to 458 MiB on an H100, depending on what ran before. They are the context's: they stay when the
communicators are destroyed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tracing.wrapped_functions import WrappedFunctions, wrap

if TYPE_CHECKING:
    import torch

DISTRIBUTED = "torch.distributed.distributed_c10d"
PAGE_BYTES = 2 << 20
"""CUDA maps memory in pages of this size: a small allocation of NCCL's, which has one of its own, takes a whole."""
ALLOCATED = re.compile(rb"Cuda C?[Aa]lloc(?:Async)? Size (?P<size>\d+) pointer (?P<at>0x[0-9a-f]+)")
SHARED = re.compile(
    rb"(?:Allocated shareable buffer|alloc done, ucptr) (?P<at>0x[0-9a-f]+) (?:.* uc)?size (?P<size>\d+)"
)
"""Buffers that other ranks write into, over NVLink or through a switch. They are logged by address, then size."""


class AllocationLog:
    """NCCL's log of its allocations, in memory of this process that no file system shows.

    A line is some 80 bytes; a communicator writes some 200.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._asked_for: dict[str, str] = {}
        self._read_to = 0
        self._pages: set[int] = set()

    def ask_for(self) -> None:
        """Have NCCL write it, once; where somebody else has said what NCCL logs, it is left at that."""
        if self._file is not None or _is_configured():
            return
        file = self._file = os.memfd_create("nccl-allocations")
        path = f"/proc/{os.getpid()}/fd/{file}"
        if Path(path).exists():  # what cannot be opened NCCL writes to the script's own output
            self._asked_for = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "ALLOC,NVLS", "NCCL_DEBUG_FILE": path}
            os.environ.update(self._asked_for)

    def held_bytes(self) -> int | None:
        """Bytes of all pages that NCCL has allocated; None: it has told of none."""
        self._read()
        return len(self._pages) * PAGE_BYTES if self._read_to else None

    def forget(self) -> None:
        """Count nothing of what has been allocated: all communicators are gone."""
        self._read()
        self._pages.clear()

    def _read(self) -> None:
        if self._file is None:
            return
        text = os.pread(self._file, os.fstat(self._file).st_size, self._read_to)
        text = text[: text.rfind(b"\n") + 1]
        self._read_to += len(text)
        for found in (*ALLOCATED.finditer(text), *SHARED.finditer(text)):
            begin, size = int(found["at"], 16), int(found["size"])
            self._pages.update(range(begin // PAGE_BYTES, -(-(begin + size) // PAGE_BYTES)))
        if text:
            self._withdraw()

    def _withdraw(self) -> None:
        """Leave the environment as it was: NCCL has read it, and the script's other processes are not ours."""
        for name, value in self._asked_for.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        self._asked_for.clear()


log = AllocationLog()
"""The log of this process."""


def held_bytes(device: torch.device) -> int | None:
    """Bytes that NCCL's communicators hold; None: there are none, or NCCL does not tell.

    Args:
        device: The GPU of this rank.
    """
    groups = _groups()
    counted = [size for group in groups if (size := _counted(group, device)) is not None]
    if counted:
        return sum(counted)
    return log.held_bytes() if groups else None


@contextmanager
def observed() -> Iterator[None]:
    """Ask NCCL for its log before its first group is made, until the context is left."""
    with _functions.heard_by(log):
        yield


def observe() -> None:
    """Ask NCCL for its log before its first group is made, for as long as this process lives."""
    _lasting.enter_context(observed())


_lasting = ExitStack()


def _wrap_all(undo: ExitStack) -> None:
    distributed = sys.modules.get(DISTRIBUTED)
    if distributed is None or not hasattr(distributed, "ProcessGroup"):  # a torch built without
        return
    wrap(undo, distributed, "_new_process_group_helper", before=_group_begins)
    for owner in (distributed, sys.modules["torch.distributed"]):
        wrap(undo, owner, "destroy_process_group", after=_group_ended)


_functions: WrappedFunctions[AllocationLog] = WrappedFunctions(_wrap_all)


def _group_begins(*args: Any, **_: Any) -> None:
    with suppress(Exception):  # no group fails for want of a log
        _size, _rank, _ranks, backend, *_others = args
        if not _groups() and "nccl" in str(sys.modules[DISTRIBUTED].BackendConfig(backend)):
            log.ask_for()


def _group_ended(*_: Any, **__: Any) -> None:
    with suppress(Exception):
        if not _groups():
            log.forget()


def _groups() -> list[Any]:
    """NCCL's process groups."""
    distributed = sys.modules.get(DISTRIBUTED)
    if distributed is None or not distributed.is_initialized():
        return []
    return [group for group, backends in list(distributed._world.pg_backend_config.items()) if "nccl" in backends]


def _counted(group: Any, device: torch.device) -> int | None:
    """NCCL's own count of a group's communicator; None: this NCCL has none, or it is not made yet."""
    with suppress(Exception):
        return int(group._get_backend(device).memory_stats()["total"])
    return None


def _is_configured() -> bool:
    """True where the environment or one of NCCL's configuration files says what it logs."""
    if any(name.startswith("NCCL_DEBUG") for name in os.environ):
        return True
    for file in (os.environ.get("NCCL_CONF_FILE") or Path.home() / ".nccl.conf", "/etc/nccl.conf"):
        with suppress(OSError):
            if "NCCL_DEBUG" in Path(file).read_text(errors="replace"):
                return True
    return False
