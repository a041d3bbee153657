"""A loss that is read without making the host wait for the GPU."""

from __future__ import annotations

from typing import Any

import torch


class Losses:
    """The losses of the micro-batches of one step.

    On a GPU each is copied to pinned memory behind the work that makes it; what
    has not arrived when the step ends is not waited for.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[torch.Tensor, Any]] = []
        self._are_shares = False

    def note(self, loss: torch.Tensor, is_share: bool = False) -> None:
        """Note one micro-batch's loss.

        Args:
            loss: A scalar.
            is_share: It is divided by all tokens of the step, not by the micro-batch's own.
        """
        self._are_shares = is_share
        if loss.device.type != "cuda":
            self._noted.append((torch.tensor(loss.item()), None))
            return
        there = torch.empty((), dtype=loss.dtype, pin_memory=True)
        there.copy_(loss.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._noted.append((there, event))

    def read(self) -> float | None:
        """The loss of the step: the mean of the micro-batches', or the sum of their shares; None if not there yet."""
        noted, self._noted = self._noted, []
        if not noted or not all(event is None or event.query() for _, event in noted):
            return None
        total = sum(float(loss) for loss, _ in noted)
        return total if self._are_shares else total / len(noted)
