"""PyTorch's memory snapshots, read without unpickling: `read` a file, then `imported.steps_of` it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from ..config import UserError
from ..feed import Work
from .entries import DeviceTrace, Snapshot
from .json_reader import JsonReader
from .pickle_reader import PickleReader, RefusedError


def read(path: Path, work: Work | None = None) -> Snapshot:
    """A snapshot of `torch.cuda.memory._dump_snapshot`, or one exported as `memory-viz`: a pickle or JSON.

    Args:
        path: The file. Memory taken grows with its entries, not with its size.
        work: Told how far it is; asked whether to go on.

    Raises:
        UserError: It cannot be read, is no snapshot, or asks for more than plain containers.
    """
    work = work or Work()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(file, size, work)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not read as a snapshot of PyTorch's memory: {error}") from None


def _read(file: BinaryIO, size: int, work: Work) -> Snapshot:
    snapshot = Snapshot()

    def tell(done: int) -> None:
        work.share = min(done / max(size, 1), 1.0)
        if work.cancelled:
            raise UserError("cancelled")

    first = file.read(1)
    file.seek(0)
    if first in (b"{", b"["):
        JsonReader(file, snapshot, tell).read()
    elif first == b"\x80":
        _take(snapshot, PickleReader(file, snapshot, tell).read(), size)
    else:
        raise RefusedError("it is neither a pickle nor JSON")
    if not snapshot.devices and not snapshot.segments:
        raise RefusedError("it has neither segments nor traces")
    work.share = 1.0
    return snapshot


def _take(snapshot: Snapshot, root: Any, size: int) -> None:
    """Take what a pickle holds beside its entries into a snapshot."""
    plain = {"segments": root} if isinstance(root, list) else root
    if not isinstance(plain, dict):
        raise RefusedError("it holds no snapshot")
    try:
        for trace in plain.get("device_traces", []):
            snapshot.devices.append(trace if isinstance(trace, DeviceTrace) else DeviceTrace())
        left = size  # every block takes bytes of the file: more of them are shared without end
        for segment in plain.get("segments", []):
            left -= snapshot.segment(segment, left) + 1
            if left < 0:
                raise RefusedError("it has more segments than the file has room for")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RefusedError(f"it is no snapshot ({type(error).__name__})") from None
