"""The README's pictures, from runs on the GPU it is started on: `python -m tests.benchmarks.pictures`.

Trains the 1.3B model of the reference experiment three ways, three steps each, opens the recordings in
the app and has it save its screens, predictions included. `--recordings FOLDER` takes `full.gpumem`,
`checkpointing.gpumem` and `lora.gpumem` from there instead, and needs no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.commands.common import opened
from gpumem_tui.tui.prediction_client import Background
from gpumem_tui.tui.settings import Settings

ASSETS = Path(__file__).parent.parent.parent / ".assets"
PROFILE = "polyglot-ko-1.3b"
RUNS = {
    "full": ["batch_size=16", "dtype=bfloat16"],
    "checkpointing": ["batch_size=16", "dtype=bfloat16", "checkpointing=layers"],
    "lora": ["batch_size=16", "dtype=bfloat16", "lora=on"],
}
STILL_S = 20.0
"""Without a new prediction for so long, all are there."""


class Picture(NamedTuple):
    """One screen: whose run, what is pressed, how large; and the runs beside it."""

    run: str
    keys: str
    size: tuple[int, int] = (100, 32)
    beside: tuple[str, ...] = ()
    predicts: bool = False


PICTURES = {
    "live": Picture("full", "1", (100, 36), predicts=True),
    "step": Picture("full", "2"),
    "layers": Picture("checkpointing", "3"),
    "techniques": Picture("full", "4", predicts=True),
    "compare": Picture("full", "5", (100, 26), beside=("checkpointing", "lora"), predicts=True),
    "events": Picture("checkpointing", "6fff", (100, 24)),
    "help": Picture("full", "1?", (140, 42)),
}


PAGE = "page"
PAGE_RUNS = ("full", "checkpointing", "lora")


def page(folder: Path, target: Path) -> None:
    """The exported page of all three runs as Chromium shows it, light and as high as the first screenful."""
    with tempfile.TemporaryDirectory() as made:
        html = Path(made) / "page.html"
        recordings = [str(folder / f"{name}.gpumem") for name in PAGE_RUNS]
        export = ["export", *recordings, "--format", "html", "--output", str(html)]
        subprocess.run([sys.executable, "-m", "gpumem_tui.tui", *export], check=True, stdout=subprocess.DEVNULL)
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        shot = [f"--screenshot={target}", "--window-size=1200,1900", html.as_uri()]
        subprocess.run([*browser, *shot], check=True, stderr=subprocess.DEVNULL)


async def picture(wanted: Picture, folder: Path) -> str:
    """The screen as SVG, as `i` saves it."""
    source = opened([folder / f"{name}.gpumem" for name in (wanted.run, *wanted.beside)])
    with closing(Background(source)) as predictions:
        app = GpumemApp(
            source, refresh_hz=0, settings=Settings(Path("/proc/none/config.toml")), predictions=predictions
        )
        async with app.run_test(size=wanted.size) as pilot:
            for key in wanted.keys:
                app.action_press(key)
            answers, since = -1, time.monotonic()
            while wanted.predicts and time.monotonic() - since < STILL_S:
                app.tick()
                await pilot.pause(0.2)
                if (now := predictions.answers()) != answers:
                    answers, since = now, time.monotonic()
            app.tick()
            await pilot.pause()
            return re.sub(r"terminal-\d+", "terminal", app.picture())


def train(folder: Path) -> None:
    """Make the recordings."""
    for name, settings in RUNS.items():
        chosen = [word for setting in settings for word in ("--set", setting)]
        run = ["run", "--profile", PROFILE, "--steps", "3", *chosen, "--save", str(folder / f"{name}.gpumem")]
        subprocess.run([sys.executable, "-m", "gpumem_tui.tui", *run], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=Path, metavar="FOLDER")
    parser.add_argument("--to", type=Path, default=ASSETS, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=[*PICTURES, PAGE], default=[*PICTURES, PAGE])
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if flags.recordings is None:
            train(Path(made))
        for name in flags.only:
            if name == PAGE:
                page(flags.recordings or Path(made), flags.to / f"{PAGE}.png")
                continue
            svg = asyncio.run(picture(PICTURES[name], flags.recordings or Path(made)))
            (flags.to / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
