"""The real app in a terminal of a size, driven by keys, over a source without an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import Environment, StepTrace
from gpumem_tui.engine.feed import Start
from gpumem_tui.engine.out_of_memory.report import OutOfMemoryReport
from gpumem_tui.engine.prediction.outcome import Prediction, Verdict
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.run import Run
from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.predictions import FoundFixes
from gpumem_tui.tui.screens.compare import MODES
from gpumem_tui.tui.settings import Settings

from .fake_source import MIB, FakeSource

RECORDINGS = Path(__file__).parent / "recordings"
SIZES = [(80, 24), (120, 40)]
GPU_UNIT = 48 * MIB


def foretold(config: RunConfig, peak_bytes: int, run: Run | bytes = b"", fits: bool | None = None) -> Prediction:
    """A prediction of a peak and little else."""
    fits = peak_bytes < 120 * MIB if fits is None else fits
    return Prediction(
        config=config, gpu="H100 80GB", loaded_bytes=0, after_step_bytes=0, peak_bytes=peak_bytes, by_category={},
        by_phase={},
        peak_phase="forward", reserved_bytes=peak_bytes, expandable_bytes=None,
        verdict=Verdict.FITS if fits else Verdict.TOO_LARGE, managed_bytes=0, pinned_bytes=0, unsure_bytes=0,
        safe_bound_bytes=peak_bytes, available_bytes=peak_bytes if fits else peak_bytes - 1,
        max_positions=0, notes=(), seconds=0.0, whole_run=run,
    )  # fmt: skip


class Oracle:
    """Predicts by a rule of the test.

    Args:
        rule: The peak that it says a configuration has; None: it is not known yet.
        ready: Whether anything is known.
        queue: How many it says are being worked out.
    """

    gpu_name = "H100 80GB"

    def __init__(self, rule: Callable[[RunConfig], int | None], ready: bool = True, queue: int = 0) -> None:
        self.rule, self.ready, self.queue = rule, ready, queue
        self.dropped = False
        self.found = FoundFixes()
        self._asked: dict[str, RunConfig] = {}

    def of(self, config: RunConfig, hurry: bool = True) -> Prediction | None:
        self._asked[repr(config)] = config
        peak = self._peak(config)
        return foretold(config, peak) if peak is not None else None

    def problem(self, config: RunConfig) -> str:
        return ""

    def of_run(self, run: Run) -> Prediction | str:
        return ""

    def look_at(self, environment: Environment) -> None:
        pass

    def expandable_bytes(self, trace: StepTrace) -> int:
        return 100 * MIB

    def fixes(self, run: Run, report: OutOfMemoryReport) -> FoundFixes:
        return self.found

    def waiting(self) -> int:
        return self.queue

    def unanswered(self, configs: Sequence[RunConfig]) -> int:
        return sum(self._peak(config) is None for config in configs)

    def answers(self) -> int:
        return sum(self._peak(config) is not None for config in self._asked.values())

    def drop(self) -> None:
        self.dropped = True

    def _peak(self, config: RunConfig) -> int | None:
        return self.rule(config) if self.ready else None


class Driver:
    """An app in a terminal of a size, and the source behind it."""

    def __init__(self, app: GpumemApp, source: Any, pilot: Pilot[None]) -> None:
        self.app, self.source, self.pilot = app, source, pilot

    async def press(self, *keys: str) -> None:
        """Keys as the app gets them from Textual; `pilot.press` takes its time over each."""
        for key in keys:
            self.app.action_press(key)
        await self.tick()

    async def compare_by(self, mode: int) -> None:
        """On the compare screen, by one of its `MODES`."""
        await self.press("5")
        await self.press(*["tab"] * ((mode - self.app.page.mode) % len(MODES)))

    async def tick(self) -> None:
        self.app.tick()
        await self.pilot.pause(0)  # until all messages are processed; without a delay it waits for an idle process
        assert "cannot be drawn" not in self.text

    @property
    def lines(self) -> list[str]:
        """The rows as they would reach the terminal."""
        canvas = self.app.canvas
        return [canvas.render_line(y).text for y in range(canvas.size.height)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def line(self, start: str) -> str:
        """The first row that begins so, spaces aside."""
        return next(line for line in self.lines if line.strip().startswith(start))

    @property
    def last_start(self) -> Start:
        command = self.source.commands[-1]
        assert isinstance(command, Start)
        return command


@asynccontextmanager
async def shown(
    source: Any,
    size: tuple[int, int] = (80, 24),
    save_dir: Path | None = None,
    settings: Settings | None = None,
    **given: Any,
) -> AsyncIterator[Driver]:
    app = GpumemApp(
        source, refresh_hz=0, save_dir=save_dir, settings=settings or Settings(Path("/proc/none/config.toml")), **given
    )
    async with app.run_test(size=size) as pilot:
        driver = Driver(app, source, pilot)
        await driver.tick()
        yield driver


def trained(steps: int = 2, **settings: Any) -> FakeSource:
    """A source some steps into a run."""
    source = FakeSource()
    source.start(**settings)
    for _ in range(steps):
        source.finish_step()
    return source


def opened(*names: str) -> Recording:
    """Committed recordings, opened together."""
    return Recording(*(RECORDINGS / f"{name}.gpumem" for name in names))


async def restarted(driver: Driver, *keys: str, steps: int = 2) -> None:
    """Press, and let the engine obey and train."""
    assert isinstance(driver.source, FakeSource)
    await driver.press(*keys)
    driver.source.obey()
    for _ in range(steps):
        driver.source.finish_step()
        await driver.tick()
