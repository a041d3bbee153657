"""Colours: legible in every theme, told apart by colour-blind readers, and never the only way to tell."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from rich.color import Color

from gpumem_tui.engine.categories import CATEGORIES, Category
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.terminal_background import from_answer, from_environment
from gpumem_tui.tui.themes import DARK, LIGHT, THEMES, XTERM, Theme, contrast

MINIMUM = 4.5
TEXTS = ("dim", "good", "busy", "bad", "accent")


@pytest.mark.parametrize("theme", [DARK, LIGHT], ids=lambda theme: theme.name)
def test_text_is_legible_on_every_background_a_theme_is_for(theme: Theme) -> None:
    for background in theme.backgrounds:
        for name in TEXTS:
            assert contrast(getattr(theme, name), background) >= MINIMUM, (name, background)
        for category, colour in theme.colours.items():
            assert contrast(colour, background) >= MINIMUM, (category, background)


def test_text_without_a_background_to_rely_on_has_the_terminals_own_colour() -> None:
    palette = Palette(THEMES["ansi"])
    for name in (*TEXTS, "plain", "bold"):
        color = getattr(palette, name).color
        assert color is None or color.is_default, name


@pytest.mark.parametrize("name", list(THEMES))
@pytest.mark.parametrize("kind", ["paint", "texture", "device"])
def test_letters_are_legible_on_their_fill(name: str, kind: str) -> None:
    for key, style in getattr(Palette(THEMES[name]), kind).items():
        assert style.color is not None and style.bgcolor is not None
        assert contrast(_hex(style.color), _hex(style.bgcolor)) >= MINIMUM, key


def _hex(color: Color) -> str:
    return XTERM.get(color.name) or color.get_truecolor().hex


# What a reader with protanopia or deuteranopia sees, in linear RGB: Machado, Oliveira
# and Fernandes 2009, severity 1.0.
SIGHT: dict[str, npt.NDArray[np.float64]] = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
OFTEN_TOUCH = ("PG", "PO", "GO", "OA", "OT", "AL", "AK", "AR", "AT", "KL", "LT", "GA", "PA", "GT", "OK", "RL", "RT",
               "PU", "GU", "UT", "UR", "UL", "CA", "CL")  # fmt: skip
APART = 0.1
"""In OKLab; black and white are 1.0 apart."""


def _oklab(colour: str, sight: str) -> npt.NDArray[np.float64]:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SIGHT[sight] @ linear, 0, 1)
    cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]]) @ seen  # fmt: skip
    lab: npt.NDArray[np.float64] = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]) @ np.cbrt(cones)  # fmt: skip
    return lab


@pytest.mark.parametrize("theme", [DARK, LIGHT], ids=lambda theme: theme.name)
@pytest.mark.parametrize("sight", list(SIGHT))
def test_neighbours_are_told_apart_also_by_colour_blind_readers(theme: Theme, sight: str) -> None:
    letters = {info.letter: category for category, info in CATEGORIES.items()}
    pairs = {*pairwise(Category), *((letters[a], letters[b]) for a, b in OFTEN_TOUCH)}
    for one, other in pairs:
        apart = np.linalg.norm(_oklab(theme.colours[one], sight) - _oklab(theme.colours[other], sight))
        assert apart >= APART, (one.name, other.name, round(float(apart), 3))


def test_every_category_has_a_letter_a_texture_and_a_colour_of_its_own() -> None:
    assert len({info.letter for info in CATEGORIES.values()}) == len(Category)
    assert len({info.texture for info in CATEGORIES.values()}) == len(Category)
    for theme in THEMES.values():
        assert len(set(theme.colours.values())) == len(Category)


@pytest.mark.parametrize(
    ("answer", "background"),
    [
        (b"\x1b]11;rgb:1e1e/1e1e/1e1e\x1b\\\x1b[?62;c", "dark"), (b"\x1b]11;rgb:fdf6/f6f6/e3e3\x07\x1b[?1;2c", "light"),
        (b"\x1b]11;rgb:ff/ff/ff\x07", "light"), (b"\x1b[?62;c", "dark"), (b"", "dark"),
    ],
)  # fmt: skip
def test_what_a_terminal_answers(answer: bytes, background: str) -> None:
    assert from_answer(answer) == background


def test_what_the_environment_says() -> None:
    assert [from_environment(text) for text in ("15;0", "0;15", "0;default;7", "", "x")] == [
        "dark", "light", "light", "", "",
    ]  # fmt: skip
