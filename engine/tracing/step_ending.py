"""The ways in which a step ends before its time."""

from __future__ import annotations

import torch

from ..config import one_line
from ..events import OPEN, Ending, EndKind
from ..out_of_memory.refusal import Refusal
from ..out_of_memory.report import size_text


class StepLeft(BaseException):
    """Raised into `Tracer.step` by whoever leaves a step that is somebody else's.

    Never the script's own error: a context that an error passes through sets
    its traceback, and fails if it cannot.

    Args:
        ending: How the step ended.
    """

    def __init__(self, ending: Ending = OPEN) -> None:
        super().__init__()
        self.ending = ending


def aborted(error: BaseException | None, refusal: Refusal | None) -> Ending:
    """The ending of a step that an error ended where it was.

    Args:
        error: Which; None: the refusal that somebody has made good.
        refusal: Of the step; None: it had none.
    """
    asked = refusal.refused.asked_bytes if refusal is not None else None
    if error is None:
        return Ending(EndKind.ABORTED, f"out of memory: asked for {size_text(asked or 0)}", asked)
    return Ending(EndKind.ABORTED, one_line(error), asked if isinstance(error, torch.OutOfMemoryError) else None)


def ending_by(error: BaseException, refusal: Refusal | None) -> Ending:
    """The ending of a step that an exception left; one that is left on request never ends."""
    if isinstance(error, StepLeft):
        return error.ending
    return aborted(error, refusal) if isinstance(error, Exception) else OPEN
