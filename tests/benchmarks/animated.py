"""The app over a run made beforehand, for `tests.benchmarks.terminal`: no engine shares the process."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path

from gpumem_tui.engine.events import Gauge, StepTrace
from gpumem_tui.engine.run_events import RunEvent
from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.settings import Settings

from ..fake_source import GPU, MIB, FakeSource

FRAME_S = 0.1


class Animated(FakeSource):
    """Shows frame after frame, ten a second, by the clock."""

    def make(self, frames: int) -> None:
        """Make them all."""
        self.start(checkpointing="layers")
        for _ in range(2):
            self.finish_step()
        self.frames: list[tuple[Gauge | None, StepTrace | None, Sequence[StepTrace], int]] = []
        for _ in range(frames):
            self.advance()
            seen = self.feed.events(0)
            self.frames.append((self.feed.gauge, self.feed.latest, self.feed.traces(), len(seen)))
        self.told = list(self.feed.events(0))
        self.began = time.monotonic()

    @property
    def _frame(self) -> tuple[Gauge | None, StepTrace | None, Sequence[StepTrace], int]:
        return self.frames[int((time.monotonic() - self.began) / FRAME_S) % len(self.frames)]

    def gauge(self) -> Gauge | None:
        return self._frame[0]

    def trace(self) -> StepTrace | None:
        return self._frame[1]

    def traces(self) -> Sequence[StepTrace]:
        return self._frame[2]

    def milestones(self, since: int) -> Sequence[RunEvent]:
        return self.told[since : self._frame[3]]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hz", type=float, default=10)
    source = Animated(GPU, layers=24, unit=12 * MIB)
    source.make(1200)
    gc.freeze()  # as `commands/app.py` does; the run made beforehand is not the app's
    GpumemApp(source, refresh_hz=parser.parse_args().hz, settings=Settings(Path("/proc/none/config.toml"))).run(
        mouse=False
    )


if __name__ == "__main__":
    main()
