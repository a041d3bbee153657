"""Commands from the app, pause, stop, save, and what a run that fails leaves on the screen."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpumem_tui.engine.events import Environment
from gpumem_tui.engine.feed import Pause, Save, Stop
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.run_events import Note, OutOfMemory, RunEnded, RunEvent, RunFailed
from gpumem_tui.tui.control import free_name
from gpumem_tui.tui.event_log import Filter

from .app_driver import RECORDINGS, Driver, shown, trained
from .fake_source import CPU, GPU, MIB, FakeSource


async def test_pause_stop_restart() -> None:
    source = trained(1)
    async with shown(source) as driver:
        await driver.press("h")
        assert source.commands[-1] == Pause(True)
        assert "held" in driver.lines[0]
        assert driver.lines[-2].startswith(" h goes on")
        await driver.press("6")
        assert any(line.split()[1:] == ["held", "held"] for line in driver.lines)
        await driver.press("1")
        await driver.press("h")
        assert source.commands[-1] == Pause(False)
        await driver.press("x")
        assert source.commands[-1] == Stop()
        assert "stopping" in driver.lines[0]
        source.obey()
        await driver.tick()
        assert "stopped" in driver.lines[0]
        assert driver.line("P parameters")
        await driver.press("h")
        assert source.commands[-1] == Stop()
        await driver.press("r")
        assert driver.last_start.config == source.run.config


@pytest.mark.parametrize("environment", [CPU, GPU])
async def test_once_a_run_is_over_the_live_screen_says_what_is_allocated_now(environment: Environment) -> None:
    source = FakeSource(environment)
    source.start(checkpointing="layers")
    for _ in range(2):
        source.finish_step()
    source.advance(9)
    async with shown(source) as driver:
        assert "recomputed; layer" in driver.text
        await driver.press("l", "x")
        assert "restarting" not in driver.text, "the message of what has been called off"
        assert "stopping" in driver.lines[-2]
        source.obey()
        await driver.tick()
        assert driver.line("MiB").split()[:3] == ["MiB", "now", "peak"]
        assert driver.line("P parameters").split()[2] == "0.0"
        assert driver.line("allocated").split()[1] == "0.0"
        assert "recomputed; layer" not in driver.text
        assert driver.lines[-2].startswith(" r starts it again")
        gauge = source.gauge()
        assert gauge is not None
        source.feed.gauge = replace(gauge, allocated_bytes=64 * MIB)
        await driver.tick()
        assert driver.line("P parameters").split()[2] == "–", "what it is nobody says"
        assert "64.0" in driver.text
        await driver.press("r")
        assert "starts it again" not in driver.text


async def test_save_makes_a_name_of_its_own_and_says_where(tmp_path: Path) -> None:
    source = trained(1)
    async with shown(source, save_dir=tmp_path) as driver:
        await driver.press("s", "s")
        paths = [command.path for command in source.commands if isinstance(command, Save)]
        assert len(set(paths)) == 2
        assert all(p.parent == tmp_path and p.name.startswith("gpumem-polyglot-ko-1.3b-") for p in paths)
        assert all(p.suffix == ".gpumem" for p in paths)
        said = "".join(line.strip() for line in driver.lines[-4:-1])
        assert f"saved{paths[-1]}" in said.replace(" ", "")


async def test_saving_shows_how_far_it_is_and_escape_cancels_it(tmp_path: Path) -> None:
    source = trained(1)
    source.saves_slowly = True
    async with shown(source, save_dir=tmp_path) as driver:
        await driver.press("s")
        (command,) = (c for c in source.commands if isinstance(c, Save))
        assert driver.lines[-2].startswith(f" saving {command.path.name}  0 %, esc cancels")
        command.work.share = 0.42
        await driver.tick()
        assert "  42 %, esc cancels" in driver.lines[-2]
        await driver.press("s")
        assert command is source.commands[-1], "one at a time"
        await driver.press("escape")
        assert command.work.cancelled
        command.work.over = True
        source.feed.tell(Note(text=f"{command.path}: not saved: cancelled"))
        await driver.tick()
        assert "esc cancels" not in driver.text
        assert "not saved: cancelled" in driver.text


async def written(driver: Driver) -> None:
    """Until what a thread of its own writes is there."""
    deadline = time.monotonic() + 30
    while driver.app.control.saving is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await driver.tick()


async def test_a_run_is_exported_with_a_key_as_a_page_and_from_the_palette_in_any_format(tmp_path: Path) -> None:
    async with shown(Recording(RECORDINGS / "full.gpumem"), save_dir=tmp_path) as driver:
        await driver.press("X")
        await written(driver)
        (page,) = tmp_path.iterdir()
        assert page.name.startswith("gpumem-polyglot-ko-1.3b-") and page.suffix == ".html"
        assert page.read_text().startswith("<!doctype html>")
        offered = {command.title: command for command in driver.app.get_system_commands(driver.app.screen)}
        offered["Export the run: perfetto"].callback()
        await written(driver)
        assert len([*tmp_path.glob("*.perfetto-trace")]) == 1
        assert ".perfetto-trace" in "".join(line.strip() for line in driver.lines[-4:-1])


def test_names_of_recordings_are_safe_and_free(tmp_path: Path) -> None:
    first = free_name(tmp_path, "../EleutherAI/a b:c", set(), lambda: 0.0)
    assert first.parent == tmp_path
    assert first.name.startswith("gpumem-a-b-c-19")
    first.touch()
    second = free_name(tmp_path, "../EleutherAI/a b:c", set(), lambda: 0.0)
    assert second != first
    assert free_name(tmp_path, "../EleutherAI/a b:c", {second}, lambda: 0.0) not in (first, second)


@pytest.mark.parametrize("kind", [OutOfMemory, RunFailed])
async def test_a_failure_is_shown_and_the_app_lives(kind: type[RunEvent]) -> None:
    source = trained(1)
    source.advance(8)
    async with shown(source) as driver:
        source.fail(kind, "it needs 1 GiB more than there is")
        await driver.tick()
        assert ("failed" if kind is RunFailed else "out of memory") in driver.lines[0]
        assert "it needs 1 GiB more" in driver.lines[-2]
        assert driver.line("P parameters")
        await driver.press("6", "f", "f", "up")
        assert "it needs 1 GiB more" in driver.text
        await driver.press("enter")
        assert ("Traceback" if kind is RunFailed else "1,073,741,824") in driver.text
        await driver.press("escape", "escape", "1", "r")
        source.obey()
        source.finish_step()
        await driver.tick()
        assert driver.line("step").split()[1] == "1"


async def test_a_leak_is_a_problem() -> None:
    source = trained(1)
    async with shown(source) as driver:
        source.end("stopped", leaked=512)
        await driver.tick()
        assert "512 bytes leaked" in driver.lines[-2]
        assert [type(m) for m in driver.app.state.logs[Filter.PROBLEMS]] == [RunEnded]


@pytest.mark.parametrize("screen", "12345 6".replace(" ", ""))
async def test_a_screens_table_is_copied_whole(screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained(40)
    copied: list[str] = []
    async with shown(source) as driver:
        monkeypatch.setattr(driver.app, "copy_to_clipboard", copied.append)
        await driver.press(screen, "y")
        table = driver.app.board.page.table()
        lines = copied[0].splitlines()
        if table is None:
            assert len(lines) == 24
        else:
            assert lines == ["\t".join(cells) for cells in table]
            assert len({len(cells) for cells in table}) == 1
        if screen == "6":
            assert len(lines) > 40
        assert f"copied {len(lines)} lines" in driver.text


async def test_a_layers_tensors_are_copied_too() -> None:
    async with shown(trained(2)) as driver:
        await driver.press("3", "down", "enter")
        table = driver.app.board.page.table()
        assert table is not None
        assert table[0] == ["bytes", "category", "name", "shape", "made"]
        assert sum(int(cells[0]) for cells in table[1:]) == 24 * MIB


async def test_the_screen_is_saved_as_a_picture_and_as_text(tmp_path: Path) -> None:
    async with shown(trained(2), save_dir=tmp_path) as driver:
        await driver.press("i")
        (svg,), (text,) = tmp_path.glob("*.svg"), tmp_path.glob("*.txt")
        assert "optimizer" in svg.read_text()
        assert "P parameters" in text.read_text()
        assert svg.stem in driver.text.replace("\n", "").replace(" ", "")


async def test_a_picture_that_cannot_be_saved_is_said() -> None:
    async with shown(trained(2), save_dir=Path("/proc/none")) as driver:
        await driver.press("i")
        assert "No such file" in driver.text
