"""Every screen at four sizes in four looks, from committed recordings, as it was when somebody last looked at it.

A frame is kept to be read in a diff: its text, and beneath it how each cell is styled,
by letters that a legend explains. When a screen is meant to change:
`GPUMEM_SNAPSHOTS=write pytest tests/test_snapshots.py`, and look at what `git diff` shows.
The app's own picture of each has the same cells; what a style comes to in a picture is
kept too, and two pictures whole.
"""

from __future__ import annotations

import html
import os
import re
import string
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine.recording import Recording
from gpumem_tui.tui.board import Board
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.run_summary import summarize
from gpumem_tui.tui.screens import screens
from gpumem_tui.tui.settings import Settings
from gpumem_tui.tui.themes import THEMES
from gpumem_tui.tui.widgets.row_diff import Cell, cells

from .app_driver import RECORDINGS, shown

SNAPSHOTS = Path(__file__).parent / "snapshots"
WRITE = os.environ.get("GPUMEM_SNAPSHOTS") == "write"
SIZES = [(60, 20), (80, 24), (120, 40), (200, 60)]
LOOKS = {"dark": Palette(THEMES["dark"]), "light": Palette(THEMES["light"]), "ansi": Palette(THEMES["ansi"]),
         "no-colour": Palette(mono=True)}  # fmt: skip
LETTERS = string.ascii_letters
SCREENS = [*(kind.title for kind in screens()), "help"]
NAMES = ["full", "checkpointed", "lora"]
RECORDING = {"compare": "full", "layers": "checkpointed", "events": "checkpointed", "ranks": "ranks"}
"""By screen; the others show `full`."""


def board(screen: str, palette: Palette) -> Board:
    name = RECORDING.get(screen, "full")
    recordings = opened() if name in NAMES else Recording(RECORDINGS / f"{name}.gpumem")
    made = Board(recordings, Settings(Path("/proc/none/config.toml")), palette)
    made.state.update(made.control.source, 0.0)
    if name in NAMES:
        made.control.look_at(NAMES.index(name))
    made.state.update(made.control.source, 0.0)
    if screen == "help":
        made.toggle_help()
    else:
        made.page = made.pages[SCREENS.index(screen)]
    return made


def cells_of(screen: str, palette: Palette, size: tuple[int, int]) -> list[list[Cell]]:
    return [cells(row.strip(size[0])) for row in board(screen, palette).rows(*size)]


def text_of(frame: list[list[tuple[str, Any]]]) -> str:
    return "".join("".join(character for character, _ in row).rstrip() + "\n" for row in frame)


def opened() -> Recording:
    return Recording(*(RECORDINGS / f"{name}.gpumem" for name in NAMES))


def kept(path: Path, new: str) -> str:
    """What is kept, replaced first if that is asked for."""
    if WRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(new, encoding="utf-8")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def compressed(letters: list[str]) -> str:
    """Runs of equal cells: `3a 77b`."""
    return " ".join(f"{len(list(run))}{letter}" for letter, run in groupby(letters))


def styles_of(frames: dict[str, list[list[Cell]]]) -> str:
    """A letter for each style, one row for each look that it has, and the letters of all cells."""
    legend: dict[tuple[str, ...], str] = {}
    rows = []
    for y in range(len(frames["dark"])):
        row = zip(*(frame[y] for frame in frames.values()), strict=True)
        letters = [legend.setdefault(tuple(str(style) for _, style in cell), LETTERS[len(legend)]) for cell in row]
        rows.append(f"{y:>2} {compressed(letters)}\n")
    meaning = (f"{letter} " + " | ".join(styles) + "\n" for styles, letter in legend.items())
    return f"  {' | '.join(frames)}\n" + "".join(meaning) + "".join(rows)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("screen", SCREENS)
def test_screens_look_as_they_did(screen: str, size: tuple[int, int]) -> None:
    width, height = size
    frames = {look: cells_of(screen, palette, size) for look, palette in LOOKS.items()}
    texts = {look: text_of(frame) for look, frame in frames.items()}
    assert texts["dark"] == texts["light"] == texts["ansi"], "a theme changes no word"
    colours = r"#|\bon\b|red|green|blue|cyan|yellow|magenta"
    assert not [style for row in frames["no-colour"] for _, style in row if re.search(colours, str(style))]
    frame = texts["dark"] + "=" * width + "\n" + styles_of(frames)
    if texts["no-colour"] != texts["dark"]:
        frame += "=" * width + "\n" + texts["no-colour"]
    assert frame.splitlines() == kept(SNAPSHOTS / f"{screen}-{width}x{height}.txt", frame).splitlines()


class Picture:
    """The cells of a picture that Textual makes of its screen, each a character and how it is drawn."""

    CELL_WIDTH, CELL_HEIGHT = 12.2, 24.4
    RULE = re.compile(r"\.terminal-(r\d+) \{ (.*?) \}")
    TEXT = re.compile(r'<text class="terminal-(r\d+)" x="([\d.]+)" y="[\d.]+"[^>]*terminal-line-(\d+)\)">([^<\n]+)<')
    GROUND = re.compile(r'<rect fill="([^"]+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"')

    def __init__(self, svg: str, width: int, height: int) -> None:
        rules = dict(self.RULE.findall(svg))
        grounds = [[""] * width for _ in range(height)]
        for fill, x, y, long in self.GROUND.findall(svg):
            left, row = round(float(x) / self.CELL_WIDTH), int(float(y) / self.CELL_HEIGHT)
            for column in range(left, left + round(float(long) / self.CELL_WIDTH)):
                if row < height and column < width:
                    grounds[row][column] = f" on {fill}"
        self.rows = [[(" ", ground) for ground in row] for row in grounds]
        for name, x, line, text in self.TEXT.findall(svg):
            column = round(float(x) / self.CELL_WIDTH)
            for i, character in enumerate(html.unescape(text).replace("\N{NO-BREAK SPACE}", " ")):
                if character != " ":
                    ground = grounds[int(line)][column + i]
                    self.rows[int(line)][column + i] = (character, rules[name].replace(";font", "; font") + ground)


@pytest.mark.parametrize("look", LOOKS)
async def test_as_pictures(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, keys, the app, the canvas, the terminal's picture of itself: cell by cell what the screens say."""
    if look == "no-colour":
        monkeypatch.setenv("NO_COLOR", "1")
    settings = Settings(Path("/proc/none/config.toml"))
    settings.values["theme"] = look if look == "ansi" else "auto"
    background = "light" if look == "light" else "dark"
    drawn_as: dict[str, set[str]] = {}
    for recording in ("full", "checkpointed"):
        screens = [screen for screen in SCREENS if RECORDING.get(screen, "full") == recording]
        async with shown(opened(), settings=settings, background=background) as driver:
            driver.app.control.look_at(NAMES.index(recording))
            driver.app.tick()
            for size in SIZES:
                await driver.pilot.resize_terminal(*size)
                for screen in screens:
                    await driver.press(*("1?" if screen == "help" else str(SCREENS.index(screen) + 1)))
                    svg = re.sub(r"terminal-\d+", "terminal", driver.app.picture())
                    if (look, screen, size[0]) in (("dark", "live", 80), ("light", "step", 80)):
                        assert svg == kept(SNAPSHOTS / f"{screen}-{look}.svg", svg)
                    picture, frame = Picture(svg, *size).rows, cells_of(screen, LOOKS[look], size)
                    assert text_of(picture) == text_of(frame)
                    for (_, drawn), (_, style) in zip(chain(*picture), chain(*frame), strict=True):
                        if drawn:
                            drawn_as.setdefault(str(style), set()).add(drawn)
                await driver.press("?" if driver.app.page.title == "help" else "escape")
    lines = "".join(f"{style}: {' or '.join(sorted(drawn))}\n" for style, drawn in sorted(drawn_as.items()))
    if look == "no-colour":
        assert not re.search(r"#(?!c5c8c6|292929|868887)", lines), "only ink, ground and dim"
    assert lines.splitlines() == kept(SNAPSHOTS / f"pictures-{look}.txt", lines).splitlines()


def test_the_recordings_are_what_their_script_makes() -> None:
    from .recordings.make import RECORDINGS as WANTED
    from .recordings.make import job, ran

    wanted = {name: [ran(settings)] for name, settings in WANTED.items()} | {"ranks": job(4)}
    for name, runs in wanted.items():
        for made, committed in zip(runs, Recording(RECORDINGS / f"{name}.gpumem").runs(), strict=True):
            assert summarize(made, name)._replace(run=committed) == summarize(committed, name)
            assert made.events() == committed.events()
