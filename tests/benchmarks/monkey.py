"""Random keys and resizes against the app: `python -m tests.benchmarks.monkey --minutes 10`.

An engine without torch runs behind it and obeys. Ends with a traceback and the keys that led
there if anything raises or a screen cannot be drawn; the same seed presses the same keys.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import deque
from pathlib import Path

from gpumem_tui.engine.feed import Start, Stop
from gpumem_tui.engine.run_events import OutOfMemory, RunFailed
from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.settings import Settings

from ..fake_source import GPU, MIB, FakeSource


def keys_of(app: GpumemApp) -> list[str]:
    """Every key that does something somewhere, but quitting, and some that do nothing."""
    actions = [*app.board.everywhere, *(action for page in app.board.pages for action in page.actions)]
    keys = {key for action in actions for key in action.keys if action.name != "quit"}
    return [*sorted(keys), "tab", "backspace", "€", "ctrl+a", "f5"]


async def monkey(seed: int, seconds: float, folder: Path) -> dict[str, int]:
    """Press and resize for a while; returns what was done."""
    rnd = random.Random(seed)
    source = FakeSource(GPU, layers=rnd.choice((2, 24, 60)), unit=rnd.choice((1, 48)) * MIB)
    app = GpumemApp(source, refresh_hz=0, save_dir=folder, settings=Settings(folder / "config.toml"))
    done = {"keys": 0, "resizes": 0, "restarts": 0}
    last: deque[str] = deque(maxlen=40)
    async with app.run_test(size=(80, 24)) as pilot:
        keys, deadline = keys_of(app), time.monotonic() + seconds
        while time.monotonic() < deadline:
            act = rnd.random()
            if act < 0.02:
                size = rnd.randint(1, 220), rnd.randint(1, 70)
                last.append(f"resize {size}")
                await pilot.resize_terminal(*size)
                done["resizes"] += 1
            elif act < 0.03:
                last.append(":")
                await pilot.press(":", *rnd.choices("abcdef", k=2), "escape")
            elif act < 0.3:
                obey(source, rnd, done)
            else:
                key = rnd.choice(keys)
                last.append(key)
                app.action_press(key) if key not in (":", "ctrl+p") else None
                done["keys"] += 1
            app.tick()
            await pilot.pause()
            text = "\n".join(app.canvas.lines)
            assert "cannot be drawn" not in text, f"seed {seed}: {' '.join(last)}\n{text}"
            assert app.is_running, f"seed {seed}: {' '.join(last)}"
    return done


def obey(source: FakeSource, rnd: random.Random, done: dict[str, int]) -> None:
    """The engine does something: what it was told, some of a step, or it fails."""
    if source.commands and isinstance(source.commands[-1], Start | Stop):
        source.obey()
        source.commands.clear()
        done["restarts"] += 1
    elif source.model is None:
        source.start()
    elif rnd.random() < 0.02:
        source.fail(rnd.choice((RunFailed, OutOfMemory)))
    else:
        source.advance(rnd.randint(1, 9))


def main() -> None:
    """Seed after seed until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    deadline, total = time.monotonic() + 60 * flags.minutes, dict.fromkeys(("keys", "resizes", "restarts"), 0)
    seed = flags.seed
    while (left := deadline - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            done = asyncio.run(monkey(seed, min(left, 20.0), Path(folder)))
        total = {name: total[name] + done[name] for name in total}
        seed += 1
    print(f"{flags.minutes:g} minutes, {seed - flags.seed} apps: {total}, no exception")


if __name__ == "__main__":
    main()
