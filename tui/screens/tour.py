"""The tour of the first start: a few sentences below the live screen, half a minute in all."""

from __future__ import annotations

from ..draw import Row, wrap
from ..palette import Palette

STOPS = (
    "The bar under the device is its memory, from 0 to the edge; letters say what fills it.",
    "Below: what each category holds now, what it held at the peak, and why the peak is there.",
    "2 shows one step event by event, 3 the layers. Arrows select, and ? explains that.",
    "4 lists LoRA, checkpointing, quantization: a letter changes one, enter restarts the run.",
    "5 sets your runs side by side, 6 is the log. : finds every action; s saves, q quits.",
)
STOP_S = 6.0
KEYS = ("enter next, esc ends", "enter, esc", "")
"""What is said of them, as far as there is room."""


class Tour:
    """Where the tour is.

    Enter and escape are its own; every other key ends it and does what it always does.

    Args:
        clock_s: When it began, by the clock of `tick`.
    """

    def __init__(self, clock_s: float) -> None:
        self._at, self._since_s = 0, clock_s

    def tick(self, clock_s: float) -> bool:
        """Go on when a stop's time is up; False: it is over."""
        if clock_s - self._since_s >= STOP_S:
            return self.next(clock_s)
        return True

    def next(self, clock_s: float) -> bool:
        """Go on at once; False: it is over."""
        self._at, self._since_s = self._at + 1, clock_s
        return self._at < len(STOPS)

    def rows(self, palette: Palette, width: int) -> list[Row]:
        """The stop and its keys in two rows, at the foot of the screen."""
        head = f"tour {self._at + 1} of {len(STOPS)}: "
        first, *rest = wrap(f"{head}{STOPS[self._at]}", width - 2)
        last = " ".join(rest)
        keys = next(keys for keys in KEYS if len(last) + len(keys) + 4 <= width)
        rows = [Row().add(f" {head}", palette.accent).add(first[len(head) :], palette.bold)]
        return [*rows, Row().add(f" {last}", palette.bold).right(keys, width - 1, palette.dim)]
