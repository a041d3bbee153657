"""The app over a run made beforehand, for `tests.benchmarks.terminal`: no engine shares the process."""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import Gauge, StepTrace
from gpumem_tui.engine.feed import Command, Feed, Published, ViewerRole
from gpumem_tui.engine.run_events import RunEvent
from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.settings import Settings

from ..fake_source import GPU, MIB, FakeSource

FRAME_S = 0.1


class Frame(NamedTuple):
    """All that a tenth of a second brought."""

    gauge: Gauge
    trace: StepTrace
    events: Sequence[RunEvent]


class Animated(Published):
    """A run that goes on by the clock, ten frames a second, until its frames are used up.

    Args:
        frames: To make beforehand.
    """

    live = True
    role = ViewerRole.OWNER
    gone = False

    def __init__(self, frames: int) -> None:
        made = FakeSource(GPU, layers=24, unit=12 * MIB)
        made.start(checkpointing="layers")
        self._feed = Feed()
        self._feed.environment = GPU
        assert made.run is not None
        self._feed.begin_run(made.run.config)
        for _ in range(2):
            made.finish_step()
        told, self._frames = 0, deque[Frame]()
        for _ in range(frames):
            made.advance()
            gauge, trace, events = made.gauge(), made.run.latest, made.events(told)
            assert gauge is not None
            assert trace is not None
            self._frames.append(Frame(gauge, trace, events))
            told += len(events)
        self._next_s = time.monotonic()

    def gauge(self) -> Gauge | None:
        """Publish what has become due; the app asks for the gauge first."""
        while self._frames and self._next_s <= time.monotonic():
            frame = self._frames.popleft()
            self._feed.publish_gauge(frame.gauge)
            self._feed.publish_trace(frame.trace)
            for event in frame.events:
                self._feed.tell(event)
            self._next_s += FRAME_S
        return super().gauge()

    def command(self, command: Command) -> None:
        """Nothing can be asked of it."""
        raise UserError("made beforehand")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hz", type=float, default=10)
    source = Animated(1200)
    gc.freeze()  # as `commands/app.py` does; the run made beforehand is not the app's
    GpumemApp(source, refresh_hz=parser.parse_args().hz, settings=Settings(Path("/proc/none/config.toml"))).run(
        mouse=False
    )


if __name__ == "__main__":
    main()
