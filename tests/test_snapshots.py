"""Every screen at four sizes in four looks, from committed recordings, as it was when somebody last looked at it.

A frame's text is kept to be read in a diff; how it is styled is kept as a digest, cell by
cell. When a screen is meant to change: `GPUMEM_SNAPSHOTS=write pytest tests/test_snapshots.py`,
and look at what `git diff` shows. The app's own pictures of all of them, as SVG, are kept as
digests, two of them whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from gpumem_tui.engine.recording import Replay
from gpumem_tui.tui.board import KINDS, Board
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.recording_set import RecordingSet
from gpumem_tui.tui.run_summary import of_source
from gpumem_tui.tui.settings import Settings
from gpumem_tui.tui.themes import THEMES

from .app_driver import shown

HERE = Path(__file__).parent
SNAPSHOTS, RECORDINGS = HERE / "snapshots", HERE / "recordings"
WRITE = os.environ.get("GPUMEM_SNAPSHOTS") == "write"
SIZES = [(60, 20), (80, 24), (120, 40), (200, 60)]
LOOKS = {"dark": Palette(THEMES["dark"]), "light": Palette(THEMES["light"]), "ansi": Palette(THEMES["ansi"]),
         "no-colour": Palette(mono=True)}  # fmt: skip
SCREENS = [*(kind.title for kind in KINDS), "help"]
NAMES = ["full", "checkpointed", "lora"]
RECORDING = {"compare": "full", "layers": "checkpointed", "events": "checkpointed"}
"""By screen; the others show `full`."""


def board(screen: str, palette: Palette) -> Board:
    made = Board(opened(screen), Settings(Path("/proc/none/config.toml")), palette)
    made.state.update(made.control.source, 0.0)
    if screen == "help":
        made.toggle_help()
    else:
        made.page = made.pages[SCREENS.index(screen)]
    return made


def opened(screen: str) -> RecordingSet:
    found = RecordingSet([RECORDINGS / f"{name}.gpumem" for name in NAMES])
    found.look_at(NAMES.index(RECORDING.get(screen, "full")))
    return found


def kept(path: Path, new: str) -> str:
    """What is kept, replaced first if that is asked for."""
    if WRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(new, encoding="utf-8")
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("screen", SCREENS)
def test_screens_look_as_they_did(screen: str, size: tuple[int, int]) -> None:
    width, height = size
    texts: dict[str, str] = {}
    styles: dict[str, str] = {}
    for look, palette in LOOKS.items():
        strips = [row.strip(width) for row in board(screen, palette).rows(width, height)]
        texts[look] = "\n".join(strip.text.rstrip() for strip in strips) + "\n"
        runs = [(segment.text, str(segment.style)) for strip in strips for segment in strip]
        styles[look] = hashlib.sha256(json.dumps(runs).encode()).hexdigest()[:16]
        if look == "no-colour":
            assert not any(re.search(r"#|\bon\b|red|green|blue|cyan|yellow|magenta", style) for _, style in runs)
    assert texts["dark"] == texts["light"] == texts["ansi"], "a theme changes no word"
    name = f"{screen}-{width}x{height}"
    digests = "".join(f"{look} {digest}\n" for look, digest in styles.items())
    frame = f"{texts['dark']}{'=' * width}\n{digests}"
    if texts["no-colour"] != texts["dark"]:
        frame += f"{'=' * width}\n{texts['no-colour']}"
    assert frame == kept(SNAPSHOTS / f"{name}.txt", frame)


@pytest.mark.parametrize("look", LOOKS)
async def test_as_pictures(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: keys, the app, the canvas, the terminal's picture of itself."""
    if look == "no-colour":
        monkeypatch.setenv("NO_COLOR", "1")
    settings = Settings(Path("/proc/none/config.toml"))
    settings.values["theme"] = look if look == "ansi" else "auto"
    found = {}
    for source in ("full", "checkpointed"):
        background = "light" if look == "light" else "dark"
        async with shown(Replay(RECORDINGS / f"{source}.gpumem"), settings=settings, background=background) as driver:
            for width, height in SIZES:
                await driver.pilot.resize_terminal(width, height)
                for key, screen in zip("123456?", SCREENS, strict=True):
                    if RECORDING.get(screen, "full") != source:
                        continue
                    await driver.press(key)
                    svg = re.sub(r"terminal-\d+", "terminal", driver.app.picture())
                    if look == "no-colour":
                        assert not re.search(r"fill: #(?!c5c8c6|292929|868887)", svg), "only ink, ground and dim"
                    found[f"{screen}-{width}x{height}"] = hashlib.sha256(svg.encode()).hexdigest()[:16]
                    if (look, screen, width) in (("dark", "live", 80), ("light", "step", 80)):
                        assert svg == kept(SNAPSHOTS / f"{screen}-{look}.svg", svg)
                await driver.press("?" if driver.app.page.title == "help" else "escape")
    digests = "".join(f"{name} {digest}\n" for name, digest in sorted(found.items()))
    assert len(set(found.values())) == len(SCREENS) * len(SIZES)
    assert digests == kept(SNAPSHOTS / f"pictures-{look}.txt", digests)


def test_the_recordings_are_what_their_script_makes(tmp_path: Path) -> None:
    from .recordings.make import RECORDINGS as WANTED
    from .recordings.make import make

    for name, settings in WANTED.items():
        make(tmp_path / f"{name}.gpumem", settings)
        made, committed = (Replay(folder / f"{name}.gpumem") for folder in (tmp_path, RECORDINGS))
        assert of_source(made, name) == of_source(committed, name)
        assert made.milestones(0) == committed.milestones(0)
