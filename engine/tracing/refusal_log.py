"""Allocations that were refused, each with its step as it was then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from ..events import OPEN, Ending
from ..out_of_memory.refusal import Refusal, Refused
from . import owners
from .assembly import Assembler, Taken
from .recorder import Recorder
from .step_writer import StepWriter


class _Instant(NamedTuple):
    """A step as it was when an allocation was refused.

    Attributes:
        holding: What was alive, where the step was not traced.
        taken: All else.
    """

    holding: Any
    taken: Taken


class RefusalLog:
    """Takes what there is while an allocation is being refused, before the stack unwinds.

    Args:
        writer: Has the step under way.
        recorder: Tells of refusals.
        assembler: Gets the step as it was.

    Attributes:
        latest: The last refusal in the step under way, or in the one that ended last; None: there was none.
        held: What the loop holds besides the model and the optimizer.
    """

    def __init__(self, writer: StepWriter, recorder: Recorder, assembler: Assembler) -> None:
        self.latest: Refusal | None = None
        self.held: Callable[[], Iterable[owners.Owned]] = tuple
        self._writer, self._recorder, self._assembler = writer, recorder, assembler
        self._instant: _Instant | None = None
        recorder.on_refused = self._refused

    @property
    def pending(self) -> bool:
        """True from a refusal on until the step has gone on or ended: its stack may be unwinding."""
        return self._instant is not None

    def begin_step(self, held: Callable[[], Iterable[owners.Owned]]) -> None:
        """A step begins in which the loop holds what `held` gives."""
        self.latest, self.held = None, held

    def hand_on(self) -> None:
        """If an allocation was refused and somebody has made that good, the step has gone on from there."""
        if self._instant is not None:
            self._assembler.add(self._instant.taken)
            self._instant = None

    def end_step(self, ending: Ending) -> bool:
        """Hand on the step as it was at the refusal, if that ended it.

        Returns:
            Whether it did.
        """
        instant = self._instant
        if instant is None or ending.requested_bytes is None:
            return False
        if instant.holding is not None:
            self._assembler.begin(instant.holding)
        self._assembler.add(replace(instant.taken, ending=ending))
        return True

    def forget_step(self) -> None:
        """The step is over: a reference would keep alive what it held."""
        self._instant, self.held = None, tuple

    def release(self) -> None:
        """Hear of no more refusals."""
        self.forget_step()
        self._recorder.on_refused = None

    def _refused(self, refused: Refused) -> None:
        writer = self._writer
        step, module = writer.step, writer.module_now
        if step is not None:
            if not refused.operator:
                refused = replace(refused, operator=writer.operator_now)
            writer.own_model(anew=True)
            writer.own_all(self.held())
            self.hand_on()
            self._instant = _Instant(None, writer.taken(step, OPEN))
        else:
            taken = writer.taken_untraced(self.held())
            self._instant = _Instant(self._recorder.holding(), taken)
        self.latest = Refusal(
            refused=refused,
            allocated_bytes=self._recorder.allocated_bytes(),
            step=writer.number,
            phase=writer.phase,
            micro_batch=writer.micro_batch,
            module=module,
            traced=step is not None,
        )
