"""Colours by theme, and what the tests hold them to.

The text has the terminal's own colour, so that any background looks like
itself; what is coloured is legible (4.5:1) on every background a theme is for.
The categories' colours are those of `engine.categories`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..engine.categories import Category


@dataclass(frozen=True)
class Theme:
    """One theme.

    Attributes:
        name: In the config file.
        backgrounds: The darkest and the lightest it is for; empty: any.
        colours: Of categories.
        device: Of what is outside the allocator, by letter.
        dim: Of what recedes; empty: the terminal's own dim.
        good: Training, done, saved.
        busy: Loading, pending.
        bad: Out of memory, failed.
        accent: Keys, and the screen that is on.
    """

    name: str
    backgrounds: tuple[str, ...]
    colours: Mapping[Category, str]
    device: Mapping[str, str]
    dim: str = ""
    good: str = "default"
    busy: str = "default"
    bad: str = "default"
    accent: str = "default"


DARK = Theme(
    "dark",
    ("#000000", "#2b2b2b"),
    {category: category.info.dark for category in Category},
    {"c": "#6f7780", "x": "#a0a0a0", "n": "#a3be8c", "o": "#5f5f5f", "m": "#b48ead", "h": "#8fbcbb", "u": "#d08770"},
    dim="#a3a3a3", good="#7fd88f", busy="#f0c040", bad="#ff8f85", accent="#6cc8f0",
)  # fmt: skip

LIGHT = Theme(
    "light",
    ("#f2eee2", "#ffffff"),
    {category: category.info.light for category in Category},
    {"c": "#a8b0b8", "x": "#8a8a8a", "n": "#5b7f2b", "o": "#c4c4c4", "m": "#8f5f88", "h": "#3f7f7c", "u": "#a8552f"},
    dim="#5f5f5f", good="#1d6b2f", busy="#7a5200", bad="#b3261e", accent="#00608f",
)  # fmt: skip

ANSI = Theme(
    "ansi",
    (),
    {category: category.info.ansi for category in Category},
    {"c": "bright_black", "x": "white", "n": "green", "o": "bright_black", "m": "magenta", "h": "cyan", "u": "red"},
)  # fmt: skip

THEMES = {theme.name: theme for theme in (DARK, LIGHT, ANSI)}

XTERM = {
    "black": "#000000", "red": "#cd0000", "green": "#00cd00", "yellow": "#cdcd00", "blue": "#0000ee",
    "magenta": "#cd00cd", "cyan": "#00cdcd", "white": "#e5e5e5", "bright_black": "#7f7f7f",
    "bright_red": "#ff0000", "bright_green": "#00ff00", "bright_yellow": "#ffff00", "bright_blue": "#5c5cff",
    "bright_magenta": "#ff00ff", "bright_cyan": "#00ffff", "bright_white": "#ffffff",
}  # fmt: skip
"""The sixteen colours where nobody has changed them."""


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, 0 to 1 (WCAG 2.1)."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, 1 to 21 (WCAG 2.1)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def letter_on(fill: str) -> str:
    """Black or white: whichever is legible on a fill; one of them always is."""
    known = XTERM.get(fill, fill)
    black = contrast("#000000", known) >= contrast("#ffffff", known)
    if fill in XTERM:
        return "black" if black else "bright_white"
    return "#000000" if black else "#ffffff"
