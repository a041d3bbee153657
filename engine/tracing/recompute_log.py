"""Recomputes: written down while they go on, and handed on once the device has passed them."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..events import Phase, Recompute
from .recorder import Recorder, Timer
from .step_writer import StepWriter

OnRecompute = Callable[[Recompute], None]


@dataclass(frozen=True)
class _Recomputed:
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
        writer: Has the step under way.
        recorder: Knows how much is allocated, and the device's clock.
        on_recompute: Gets each of them.
    """

    def __init__(self, writer: StepWriter, recorder: Recorder, on_recompute: OnRecompute) -> None:
        self._writer, self._recorder, self._on_recompute = writer, recorder, on_recompute
        self._waiting: deque[_Recomputed] = deque()

    @contextmanager
    def recomputing(self, layers: tuple[str, ...]) -> Iterator[None]:
        """A checkpointed segment is computed again in here."""
        writer = self._writer
        writer.last_node = -1  # this thread numbers nodes on its own
        before, timer, early_stop = self._recorder.allocated_bytes(), self._recorder.timer(), False
        span = writer.begin_span(Phase.RECOMPUTE)
        writer.tag(Phase.RECOMPUTE, writer.name(layers[0]))
        writer.phase = Phase.RECOMPUTE
        try:
            yield
        except BaseException as error:
            early_stop = type(error).__name__ == "_StopRecomputationError"
            if early_stop:
                # The abandoned forward's frames still hold its temporaries.
                traceback.clear_frames(error.__traceback__)
            raise
        finally:
            timer.stop()
            held = self._recorder.allocated_bytes() - before
            self._waiting.append(_Recomputed(writer.number, writer.micro_batch, layers, held, timer, early_stop))
            if writer.step is not None:
                writer.end_span(span)
                writer.step.spans.append(span)
            writer.phase = Phase.BACKWARD
            writer.tag(Phase.BACKWARD, writer.name(layers[-1]))
            self.flush(wait=False)

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
