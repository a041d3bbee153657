"""The one place for colours and fills.

The text has the terminal's own colours, so that light and dark terminals both
look like themselves. Only categories have colours of their own: Paul Tol's
colour-blind-safe schemes, each of middling lightness. Whatever a colour says, a
letter says as well; with NO_COLOR the letters say it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rich.color import Color, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.style import Style

from ..engine.events import Category

COLOURS: dict[Category, str] = {
    Category.PARAMETERS: "#3d7fc4",
    Category.BUFFERS: "#8fb3dd",
    Category.GRADIENTS: "#ee7733",
    Category.OPTIMIZER_STATE: "#aa5faf",
    Category.ACTIVATIONS: "#009e81",
    Category.RECOMPUTED: "#d9bf4e",
    Category.KV_CACHE: "#33bbee",
    Category.LOGITS_LOSS: "#cc3d2e",
    Category.INPUTS: "#8f9a35",
    Category.TEMPORARIES: "#ee99aa",
    Category.WORKSPACE: "#96704a",
    Category.SLACK: "#8a8a8a",
    Category.UNKNOWN: "#ee3377",
}

DEVICE_COLOURS = {"c": "#6f7780", "x": "#a0a0a0", "o": "#5f5f5f", "m": "#b48ead", "u": "#d08770"}
"""What is outside the allocator: cached-free, context, other processes, managed."""

EIGHTHS_ACROSS = " ▏▎▍▌▋▊▉█"
EIGHTHS_UP = " ▁▂▃▄▅▆▇█"

BLACK, WHITE = ColorTriplet(0, 0, 0), ColorTriplet(255, 255, 255)


@dataclass(frozen=True)
class Palette:
    """Styles by role and by category.

    Attributes:
        ascii: No Unicode blocks.
        mono: No colours: everything has to be said by letters.
    """

    ascii: bool = False
    mono: bool = False

    plain = Style(color="default")
    dim = Style(color="default", dim=True)
    bold = Style(color="default", bold=True)
    cursor = Style(color="default", reverse=True)
    off = Style(color="default", dim=True, italic=True)

    @cached_property
    def good(self) -> Style:
        """Training, done, saved."""
        return self._coloured("green")

    @cached_property
    def busy(self) -> Style:
        """Loading, stopping, pending: look here."""
        return self._coloured("yellow", bold=True)

    @cached_property
    def bad(self) -> Style:
        """Out of memory, failed, refused."""
        return self._coloured("red", bold=True)

    @cached_property
    def accent(self) -> Style:
        """Keys, and the screen that is on."""
        return self._coloured("cyan")

    @cached_property
    def ink(self) -> dict[Category, Style]:
        """A category's letter and bar."""
        return {c: self._hex(colour) for c, colour in COLOURS.items()}

    @cached_property
    def paint(self) -> dict[Category, Style]:
        """A category's filled cell; its letter is legible on it."""
        return {c: self._filled(colour) for c, colour in COLOURS.items()}

    @cached_property
    def flat(self) -> dict[Category, Style]:
        """A category's filled cell whose letter recedes into it."""
        return {c: self._filled(colour, 0.35) for c, colour in COLOURS.items()}

    @cached_property
    def device(self) -> dict[str, Style]:
        """Filled cells of what is outside the allocator, by letter."""
        return {letter: self._filled(colour) for letter, colour in DEVICE_COLOURS.items()}

    def over(self, below: Category, above: Category | None) -> Style:
        """A cell in which one category ends and the next begins: eighths of `below` upon `above`."""
        style = self.ink[below]
        if above is None or self.mono:
            return style
        return style + Style(bgcolor=self.ink[above].color)

    def _coloured(self, colour: str, bold: bool = False) -> Style:
        return Style(color="default" if self.mono else colour, bold=bold or self.mono or None)

    def _hex(self, colour: str) -> Style:
        return self.plain if self.mono else Style(color=colour)

    def _filled(self, colour: str, strength: float = 1.0) -> Style:
        if self.mono:
            return self.plain
        triplet = Color.parse(colour).get_truecolor()
        light = 0.299 * triplet.red + 0.587 * triplet.green + 0.114 * triplet.blue > 115
        letter = blend_rgb(triplet, BLACK if light else WHITE, strength * 0.85)
        return Style(color=Color.from_triplet(letter), bgcolor=Color.from_triplet(triplet))
