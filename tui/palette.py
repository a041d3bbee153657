"""Styles by role and by category: a theme, or no colours at all.

Whatever a colour says, a letter says as well; with NO_COLOR the letters say it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from rich.color import Color, blend_rgb
from rich.style import Style

from ..engine.categories import Category
from .themes import DARK, Theme, contrast, letter_on

EIGHTHS_ACROSS = " ▏▎▍▌▋▊▉█"
EIGHTHS_UP = " ▁▂▃▄▅▆▇█"

LEGIBLE = 4.6
"""Contrast of letters that recede as far as they may."""


@dataclass(frozen=True)
class Palette:
    """Styles by role and by category.

    Attributes:
        theme: Where the colours are from.
        ascii: No Unicode blocks.
        mono: No colours: everything has to be said by letters.
    """

    theme: Theme = DARK
    ascii: bool = False
    mono: bool = False

    plain: ClassVar[Style] = Style()
    bold: ClassVar[Style] = Style(bold=True)
    cursor: ClassVar[Style] = Style(reverse=True)

    @cached_property
    def dim(self) -> Style:
        """The style of text that recedes."""
        return Style(dim=True) if self.mono or not self.theme.dim else Style(color=self.theme.dim)

    @cached_property
    def off(self) -> Style:
        """The style of values that cannot be had."""
        return self.dim + Style(italic=True)

    @cached_property
    def good(self) -> Style:
        """The style of what is well: training, done, saved."""
        return self._role(self.theme.good)

    @cached_property
    def busy(self) -> Style:
        """Loading, stopping, pending: look here."""
        return self._role(self.theme.busy, bold=True)

    @cached_property
    def bad(self) -> Style:
        """Out of memory, failed, refused."""
        return self._role(self.theme.bad, bold=True)

    @cached_property
    def accent(self) -> Style:
        """Keys, and the screen that is on."""
        return self._role(self.theme.accent)

    @cached_property
    def ink(self) -> dict[Category, Style]:
        """The style of a category's bar."""
        return {c: self.plain if self.mono else Style(color=colour) for c, colour in self.theme.colours.items()}

    @cached_property
    def paint(self) -> dict[Category, Style]:
        """A category's filled cell; its letter is legible on it."""
        return {c: self._filled(colour) for c, colour in self.theme.colours.items()}

    @cached_property
    def texture(self) -> dict[Category, Style]:
        """A category's filled cell whose letter and texture recede as far as they stay legible."""
        return {c: self._filled(colour, recede=True) for c, colour in self.theme.colours.items()}

    @cached_property
    def device(self) -> dict[str, Style]:
        """Filled cells of what is outside the allocator, by letter."""
        return {letter: self._filled(colour) for letter, colour in self.theme.device.items()}

    @cached_property
    def _overs(self) -> dict[tuple[int, int], Style]:
        return {}

    def over(self, below: Category, above: Category) -> Style:
        """A cell in which one category ends and the next begins: eighths of `below` upon `above`.

        The same object for the same pair, so that runs of cells join.
        """
        pair = (int(below), int(above))
        if pair not in self._overs:
            self._overs[pair] = self.ink[below] + (Style() if self.mono else Style(bgcolor=self.ink[above].color))
        return self._overs[pair]

    def _role(self, colour: str, bold: bool = False) -> Style:
        plain = self.mono or colour == "default"
        return Style(color=None if plain else colour, bold=bold or plain or None)

    def _filled(self, colour: str, recede: bool = False) -> Style:
        if self.mono:
            return self.plain
        letter = letter_on(colour)
        return Style(color=receding(letter, colour) if recede and letter.startswith("#") else letter, bgcolor=colour)


def receding(letter: str, fill: str) -> str:
    """The colour nearest to its fill at which a letter is still legible."""
    ends = Color.parse(fill).get_truecolor(), Color.parse(letter).get_truecolor()
    mixed = (blend_rgb(*ends, step / 20).hex for step in range(1, 20))
    return next((colour for colour in mixed if contrast(colour, fill) >= LEGIBLE), letter)
