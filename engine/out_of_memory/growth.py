"""Leaks: bytes alive at the same point of every step that rise from step to step."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import NamedTuple

IN_A_ROW = 6
"""So many figures in a row that rise make a leak."""
KEPT = 64
"""Figures of a level."""
AT_LEAST = 4
"""So many do where memory has run out."""
LEVELS = 3
FOLD = 8
"""Steps whose lowest figure stands for them on the next level: rows of all lengths rise and fall, a leak stays."""
EVEN = 2
"""The largest ratio of two rises of a leak."""


class Rise(NamedTuple):
    """Live bytes rise.

    Attributes:
        bytes: A step, on average.
        steps: For how many steps they have been seen to.
    """

    bytes: int
    steps: int


class LiveBytes:
    """The figure of every step, at some distance in less detail."""

    def __init__(self) -> None:
        self._levels: tuple[deque[int], ...] = tuple(deque(maxlen=KEPT) for _ in range(LEVELS))
        self._folding: list[list[int]] = [[] for _ in range(LEVELS)]

    def add(self, allocated_bytes: int) -> None:
        """A step has ended with so many bytes alive, counted where they were counted in every step before."""
        figure = allocated_bytes
        for level, folding in zip(self._levels, self._folding, strict=True):
            level.append(figure)
            folding.append(figure)
            if len(folding) < FOLD:
                return
            figure = min(folding)
            folding.clear()

    def rise(self, at_least: int = IN_A_ROW) -> Rise | None:
        """The rise of the figures, as far back as can be told; None: they do not rise.

        Args:
            at_least: So many figures in a row have to.
        """
        rises = []
        for n, level in enumerate(self._levels):
            figures = _rising_evenly(list(level))
            if len(figures) >= at_least:
                steps = (len(figures) - 1) * FOLD**n
                rises.append(Rise((figures[-1] - figures[0]) // steps, steps))
        return max(rises, key=lambda rise: rise.steps, default=None)


def _rising_evenly(figures: list[int]) -> list[int]:
    """The last of some figures, as many as rise by about the same."""
    rises = [after - before for before, after in pairwise(figures)]
    many = 0
    for n in range(1, len(rises) + 1):
        last = rises[-n:]
        if min(last) <= 0 or max(last) > EVEN * min(last):
            break
        many = n
    return figures[len(figures) - many - 1 :] if many else []
