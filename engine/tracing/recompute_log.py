"""Recomputes that have ended on the host and perhaps not yet on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..events import Recompute
from .recorder import Timer

OnRecompute = Callable[[Recompute], None]


@dataclass(frozen=True)
class Recomputed:
    """A recompute whose time may still be running on the device."""

    step: int
    micro_batch: int
    layers: tuple[str, ...]
    bytes: int
    timer: Timer
    early_stop: bool


class RecomputeLog:
    """Hands recomputes on in order, each as soon as its time is known.

    Args:
        on_recompute: Gets each of them.
    """

    def __init__(self, on_recompute: OnRecompute) -> None:
        self._on_recompute = on_recompute
        self._waiting: deque[Recomputed] = deque()

    def add(self, recomputed: Recomputed) -> None:
        """One has ended on the host."""
        self._waiting.append(recomputed)

    def flush(self, wait: bool) -> None:
        """Hand on what the device has passed.

        Args:
            wait: For the device, until all are handed on.
        """
        while self._waiting and (wait or self._waiting[0].timer.done()):
            r = self._waiting.popleft()
            self._on_recompute(Recompute(r.step, r.micro_batch, r.layers, r.bytes, r.timer.ms(), r.early_stop))

    def clear(self) -> None:
        """Forget those that are waiting."""
        self._waiting.clear()
