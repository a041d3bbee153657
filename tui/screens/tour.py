"""The tour of the first start: a few sentences below the live screen."""

from __future__ import annotations

from ..draw import Row, wrap
from ..palette import Palette

STOPS = (
    "The bar under the device is its memory, from 0 to the edge; letters say what fills it.",
    "Below: what each category holds now, what it held at the peak, and why the peak is there.",
    "2 shows one step event by event, 3 the layers. Arrows select, and ? explains that.",
    "4 lists LoRA, checkpointing, quantization: a letter changes one, enter restarts the run.",
    "5 compares runs, 6 is the log. : finds every action; s saves, q quits, w is this tour.",
)
KEYS = ("enter next, esc ends", "enter, esc", "")
"""The keys as the tour names them, by the room there is."""


class Tour:
    """The tour: it waits for its reader, and goes on from where it was when it is asked for again.

    Enter and escape are its own; every other key leaves it and does what it always does.
    """

    def __init__(self) -> None:
        self._at = 0

    def next(self) -> bool:
        """Go on; False: it is over, and begins anew the next time."""
        self._at = (self._at + 1) % len(STOPS)
        return self._at > 0

    def rows(self, palette: Palette, width: int) -> list[Row]:
        """The stop and its keys in two rows, at the foot of the screen."""
        head = f"tour {self._at + 1} of {len(STOPS)}: "
        first, *rest = wrap(f"{head}{STOPS[self._at]}", width - 2)
        last = " ".join(rest)
        keys = next(keys for keys in KEYS if len(last) + len(keys) + 4 <= width)
        rows = [Row().add(f" {head}", palette.accent).add(first[len(head) :], palette.bold)]
        return [*rows, Row().add(f" {last}", palette.bold).right(keys, width - 1, palette.dim)]
