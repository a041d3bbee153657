"""CUDA streams of the modelled device: nothing runs on them, and every allocation knows which was current.

The caching allocator gives a block that is freed back to its own stream only, so
that what is reserved depends on where each block was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .caching_allocator import DEFAULT_STREAM
from .cuda_patches import replace
from .fake_cuda import FakeCuda


class FakeStream:
    """A stream. It has done whatever it is given when that returns.

    Args:
        number: What tells it from others; DEFAULT_STREAM: the one that is current unless another is made so.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def record_event(self, event: Any = None) -> Any:
        """Returns an event that has happened."""
        return event or torch.cpu.Event()

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


@contextmanager
def fake_streams(tracker: FakeCuda) -> Iterator[None]:
    """Have PyTorch's code for a device's streams make and enter those of the tracker.

    Args:
        tracker: Told which is current.
    """
    numbers, current = itertools.count(DEFAULT_STREAM + 1), [FakeStream(DEFAULT_STREAM)]

    @contextmanager
    def entered(stream: FakeStream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        current.append(stream)
        tracker.stream = stream.number
        try:
            yield
        finally:
            current.pop()
            tracker.stream = current[-1].number

    with ExitStack() as undo:
        replace(undo, torch.cpu, "Stream", lambda *_, **__: FakeStream(next(numbers)))
        replace(undo, torch.cpu, "stream", entered)
        replace(undo, torch.cpu, "current_stream", lambda *_: current[-1])
        yield
