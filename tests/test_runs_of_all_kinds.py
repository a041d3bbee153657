"""What can be done with one Run can be done with each: live, watched, recorded, predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from gpumem_tui.engine.events import Environment, Gauge
from gpumem_tui.engine.feed import Command, Save, ViewerRole
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.recording import read, save, write
from gpumem_tui.engine.run import Run, RunKind
from gpumem_tui.engine.run_events import RunEvent
from gpumem_tui.engine.wire import pack_whole_run, unpack_whole_run
from gpumem_tui.tui.run_summary import summarize
from gpumem_tui.tui.screens.compare import MODES
from gpumem_tui.watch import watch

from .app_driver import shown
from .conftest import Engine, small_run

SCREENS = "123456"


class Some:
    """Runs of whatever kind, as a source that takes no command but to save."""

    live = False
    role = ViewerRole.OWNER
    gone = False

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    def environment(self) -> Environment | None:
        return self._runs[0].environment

    def gauge(self) -> Gauge | None:
        return self._runs[0].gauge

    def runs(self) -> Sequence[Run]:
        return self._runs

    def events(self, since: int) -> Sequence[RunEvent]:
        return []

    def command(self, command: Command) -> None:
        assert isinstance(command, Save)
        save(command, [])


def watched_run() -> Run:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with watch(model, optimizer) as watching:
        for _ in range(2):
            model(torch.ones(4, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = watching.source.run
    assert run is not None
    return run


@pytest.fixture(scope="module")
def runs(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """One of each kind; the recorded one was on a file, the predicted one in another process."""
    folder = tmp_path_factory.mktemp("runs")
    engine.run(small_run(checkpointing="layers"))
    live = engine.session.run
    assert live is not None
    write(folder / "recorded.gpumem", [live])
    (recorded,) = read(folder / "recorded.gpumem")
    predicted = unpack_whole_run(pack_whole_run(predict(live.config, gpu("H100 80GB")).run))
    yield {"live": live, "watched": watched_run(), "recorded": recorded, "predicted": predicted}


async def test_each_opens_on_every_screen(runs: dict[str, Run], tmp_path: Path) -> None:
    async with shown(Some([*runs.values()]), save_dir=tmp_path) as driver:
        for index, run in enumerate(runs.values()):
            driver.app.control.look_at(index)
            for screen in SCREENS:
                await driver.press(screen)
                assert run.config.model[:6] in driver.lines[0]
                assert "No run has started yet" not in driver.text and "nothing yet" not in driver.text
            assert driver.app.state.shown is run and driver.app.state.peak is not None
            await driver.press("2")
            assert driver.line("step ")


async def test_each_is_saved_and_is_the_same_when_it_is_opened(runs: dict[str, Run], tmp_path: Path) -> None:
    async with shown(Some([*runs.values()]), save_dir=tmp_path) as driver:
        for index, run in enumerate(runs.values()):
            driver.app.control.look_at(index)
            await driver.press("s")
            (path,) = set(tmp_path.glob("*.gpumem"))
            (again,) = read(path)
            path.unlink()
            assert (again.kind, again.config, again.environment) == (run.kind, run.config, run.environment)
            assert list(again.events()) == list(run.events())
            assert summarize(again, "x")._replace(run=run) == summarize(run, "x")


async def test_each_is_compared_with_each_other(runs: dict[str, Run]) -> None:
    async with shown(Some([*runs.values()]), (160, 40)) as driver:
        await driver.press("5")
        assert [run.run for run in driver.app.page.runs()] == [*runs.values()]
        for base in range(len(runs)):
            for other in range(len(runs)):
                driver.app.page.base, driver.app.page.selected = base, other
                for _ in MODES:
                    await driver.press("tab")
                    page = driver.app.page
                    assert MODES[page.mode] in driver.text
                    assert page.table() is not None
                    base_run, other_run, _ = page.parts(page.runs())
                    assert base_run == base and other in (other_run, base)


def test_each_says_of_itself_what_it_is(runs: dict[str, Run]) -> None:
    assert [run.kind for run in runs.values()] == [
        RunKind.TRAINED, RunKind.WATCHED, RunKind.TRAINED, RunKind.PREDICTED,
    ]  # fmt: skip
    assert len({run.id for run in runs.values()}) == len(runs)
    assert all(run.ended is not None and run.traces()[-1].is_complete for run in runs.values())
