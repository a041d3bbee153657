"""Files in TOML: the settings, models and presets, spoilt."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import UserError
from gpumem_tui.profiles import MODELS, PRESETS, read_model, read_preset
from gpumem_tui.tui.settings import Settings

from . import Tally, flipped, wrong_line

WITHIN_S = 5.0
SETTINGS = (
    'theme = "light" # mine\nrefresh = 4\ngpu = "A100"\nmouse = true\n\n[keys]\nsave = "S"\nstep.zoom-in = ["+", "="]\n'
)
VALUES = (
    "9" * 5000, "0x" + "f" * 5000, "-1", "0", "1e999", "inf", "nan", "-0.0", "true", '""', '"\\u0000"', '"\\u001b[2J"',
    '"a\\nb"', "'''a\nb'''", '"""\n"""', "[]", "{}", "[" * 3000 + "]" * 3000, "[[1], {a = 1}]", "{a.b.c = 1}",
    "1979-05-27T07:32:00Z", "07:32:00", '"' + "x" * 5000 + '"', "'\\'", "0b1_0", "=", "", '"\ud800"', "[1, \"x\", 2.5]",
)  # fmt: skip
KEYS = (
    "",
    "a",
    '"a\\nb"',
    "'\x1b'",
    "a." * 3000 + "b",
    '""',
    "théme",
    "keys",
    "[keys]",
    "[[keys]]",
    "[config.config]",
    "#",
    "[",
)


def spoilt(rnd: random.Random, text: str) -> bytes:
    """The text of a file with something wrong in it."""
    lines = text.splitlines()
    if rnd.random() < 0.3:
        return flipped(rnd, text.encode())
    for _ in range(rnd.choice((1, 1, 2))):
        at = rnd.randrange(len(lines))
        key, equals, _ = lines[at].partition(" = ")
        match rnd.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[rnd.randrange(len(lines))])
            case 2:
                lines.insert(at, f"{rnd.choice(KEYS)} = {rnd.choice(VALUES)}")
            case 3 if equals:
                lines[at] = f"{rnd.choice(KEYS)} = {lines[at].partition(' = ')[2]}"
            case _ if equals:
                lines[at] = f"{key} = {rnd.choice(VALUES)}"
        lines = lines or [""]
    newline = rnd.choice(("\n", "\n", "\n", "\r\n", "\r"))
    return rnd.choice((b"", b"", b"\xef\xbb\xbf")) + newline.join(lines).encode(errors="surrogatepass")


def _preset(path: Path) -> None:
    preset = read_preset(path)
    for settings in (preset.settings, *(row.settings for row in preset.rows)):
        techniques.parse(settings, preset.where)


def attack(folder: Path, seed: int, count: int) -> Tally:
    """Read so many files; each is read, or refused in one line that names it."""
    rnd, tally = random.Random(seed), Tally()
    kinds: list[tuple[str, Callable[[Path], Any]]] = [
        (SETTINGS, Settings.load),
        *((path.read_text(encoding="utf-8"), read_model) for path in MODELS.glob("*.toml")),
        *((path.read_text(encoding="utf-8"), _preset) for path in PRESETS.glob("*.toml")),
    ]
    path = folder / "attack.toml"
    while tally.tried < count:
        tally.tried += 1
        text, read = rnd.choice((kinds[0], rnd.choice(kinds)))
        data = spoilt(rnd, text)
        path.write_bytes(data)
        began_s = time.process_time()
        problem = None
        try:
            read(path)
        except UserError as error:
            problem = wrong_line(str(error)) or (None if str(path) in str(error) else f"names no file: {error}")
        except BaseException as error:
            problem = repr(error)[:300]
        if problem is None and (took_s := time.process_time() - began_s) > WITHIN_S:
            problem = f"took {took_s:.1f} s"
        if problem is not None:
            tally.failed.append(f"{problem} {data[:300]!r}")
    return tally
