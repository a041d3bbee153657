"""The tour of the first start: a few sentences over the live screen, half a minute in all."""

from __future__ import annotations

from ..draw import Row, wrap
from ..palette import Palette

STOPS = (
    "The bar under the device is its memory, from 0 to the edge. Letters say what fills it: P parameters, "
    "G gradients, O optimizer, A activations ...",
    "Below: what every category holds now, what it held at the peak, and why the peak is where it is.",
    "2 shows one step as an oscilloscope, 3 the layers. Arrow keys select; ? explains what is selected.",
    "4 lists the techniques: LoRA, checkpointing, quantization ... A letter changes one, enter restarts the run.",
    "5 sets your runs side by side, 6 is the log. : finds every action by name. s saves, q quits.",
)
STOP_S = 6.0


class Tour:
    """Where the tour is.

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
        """The stop, over the foot of the screen."""
        head = f" tour {self._at + 1} of {len(STOPS)}"
        rows = [Row().add(head, palette.accent).add("   enter goes on, esc ends it", palette.dim)]
        return rows + [Row().add(f" {line}", palette.bold) for line in wrap(STOPS[self._at], width - 2)]
