"""The app over a source without an engine: it fills any terminal, sends what has changed, and outlives mistakes."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from gpumem_tui.engine.categories import CATEGORIES
from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.changes import offered
from gpumem_tui.tui.draw import Row
from gpumem_tui.tui.settings import Settings
from gpumem_tui.tui.writer import writing

from .app_driver import SIZES, shown, trained
from .fake_source import FakeSource
from .vt import Screen


def test_the_app_loads_no_torch() -> None:
    code = (
        "import sys; import gpumem_tui.tui.app; from gpumem_tui.tui.changes import offered; assert offered();"
        "sys.exit(','.join(m for m in ('torch', 'transformers', 'peft', 'bitsandbytes') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_the_palette_closes_where_it_has_no_room() -> None:
    async with shown(trained()) as driver:
        driver.app.open_palette()
        await driver.pilot.pause()
        assert len(driver.app.screen_stack) == 2
        await driver.pilot.resize_terminal(4, 58)
        await driver.pilot.pause()
        assert len(driver.app.screen_stack) == 1
        driver.app.open_palette()
        await driver.tick()
        assert len(driver.app.screen_stack) == 1


async def test_before_anything_is_known() -> None:
    source = FakeSource()
    source.feed.environment = None
    async with shown(source) as driver:
        assert "The engine is starting." in driver.text
        assert driver.line("P parameters").split()[-2:] == ["–", "–"]
        for key in "23456?":
            await driver.press(key)
        await driver.press("?", "1", "l", "z", "r", "s", "space", "x")
        assert source.commands == []


@pytest.mark.parametrize("size", [*SIZES, (60, 20), (200, 60)])
async def test_every_screen_fills_the_terminal_exactly(size: tuple[int, int]) -> None:
    source = trained(checkpointing="layers", accumulation=2)
    source.advance(9)
    async with shown(source, size) as driver:
        for key in "123456?":
            await driver.press(key)
            assert len(driver.lines) == size[1]
            assert {len(line) for line in driver.lines} == {size[0]}
            for y in range(size[1]):
                assert all(segment.style is not None for segment in driver.app.canvas.render_line(y))


@pytest.mark.parametrize("size", [(59, 24), (80, 19), (20, 5)])
async def test_a_tiny_terminal_gets_one_polite_line(size: tuple[int, int]) -> None:
    async with shown(trained(), size) as driver:
        assert driver.lines[0].startswith("gpumem-tui needs 60x20"[: size[0]])
        assert "".join(driver.lines[1:]).strip() == ""
        await driver.press("2", "4", "down")
        assert driver.app.is_running


async def test_growing_out_of_a_tiny_terminal() -> None:
    async with shown(trained(), (40, 10)) as driver:
        await driver.pilot.resize_terminal(80, 24)
        await driver.pilot.pause()
        await driver.tick()
        assert driver.line("P parameters")


async def test_what_differs_is_sent_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that gets only what is sent shows what the app shows; nothing goes out when nothing changed."""
    sent: list[str] = []
    monkeypatch.setattr("gpumem_tui.tui.app.send", lambda _app, text: bool(sent.append(text)) or True)
    source = trained()
    async with shown(source) as driver:
        screen = Screen(80, 24)
        for y, line in enumerate(driver.lines):
            screen.feed(f"\x1b[{y + 1};1H{line}")
        refreshed: list[object] = []
        monkeypatch.setattr(driver.app.canvas, "refresh", lambda *regions: refreshed.extend(regions))

        async def sends() -> int:
            """How many characters go out; the screen that gets them is then as the app's."""
            await driver.tick()
            text = "".join(sent)
            sent.clear()
            screen.feed(text)
            assert screen.lines == [line.rstrip() for line in driver.lines]
            return len(text)

        assert await sends() == 0
        driver.app.draw()
        assert await sends() == 0
        driver.app.state.say("a word")
        driver.app.draw()
        assert 0 < await sends() < 250, "one row"
        await driver.press("2")
        assert await sends() > 1000
        source.finish_step()
        assert await sends() > 0
        assert await sends() == 0
        assert refreshed == [], "nothing through the compositor"


async def test_ascii_means_ascii() -> None:
    source = trained(checkpointing="layers")
    source.advance(5)
    settings = Settings(Path("/proc/none/config.toml"))
    settings.values["ascii"] = True
    async with shown(source, settings=settings) as driver:
        for key in "123456?":
            await driver.press(key)
            assert driver.text.isascii(), [line for line in driver.lines if not line.isascii()]


async def test_without_colours_letters_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    source = trained()
    async with shown(source) as driver:
        await driver.press("2")
        assert "PPPPPPPP" in driver.text
        assert "OOOOOOOO" in driver.text
        for y in range(24):
            for segment in driver.app.canvas.render_line(y):
                assert segment.style is not None
                assert segment.style.color is None or segment.style.color.is_default
                assert segment.style.bgcolor is None or segment.style.bgcolor.is_default


async def test_q_quits_and_multiplexer_keys_are_free() -> None:
    async with shown(trained()) as driver:
        for key in ("ctrl+a", "ctrl+b", "ctrl+s", "ctrl+q"):
            await driver.press(key)
        assert driver.app.is_running
        assert driver.source.commands == []
        await driver.pilot.press("q")
        assert driver.app._exit


async def test_a_mistake_in_drawing_costs_the_screen_only(monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained()
    async with shown(source) as driver:

        def broken(width: int, height: int) -> list[Row]:
            raise ZeroDivisionError("by nought")

        monkeypatch.setattr(driver.app.board.pages[2], "rows", broken)
        await driver.pilot.press("3")
        assert "cannot be drawn: ZeroDivisionError: by nought" in driver.text
        await driver.press("1")
        assert driver.line("P parameters")


async def test_a_tick_is_skipped_while_the_terminal_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained()
    async with shown(source) as driver:
        monkeypatch.setattr("gpumem_tui.tui.app.writing", lambda app: True)
        before = driver.text
        source.advance(4)
        await driver.tick()
        assert driver.text == before
        monkeypatch.setattr("gpumem_tui.tui.app.writing", lambda app: False)
        await driver.tick()
        assert driver.text != before


def test_the_writer_of_a_terminal_is_found_where_textual_keeps_it() -> None:
    """The one place with Textual's private names: fails when they move."""
    import io

    from textual.drivers._writer_thread import WriterThread

    class Terminal:
        _writer_thread = WriterThread(io.StringIO())

    app = GpumemApp(FakeSource(), refresh_hz=0)
    assert not writing(app)
    app._driver = Terminal()  # type: ignore[assignment]
    assert not writing(app)
    Terminal._writer_thread.write("x")
    assert writing(app)


async def test_help_defines_every_category() -> None:
    async with shown(trained(), (120, 60)) as driver:
        await driver.press("?")
        for info in CATEGORIES.values():
            assert info.title in driver.text
            assert info.meaning.split(",")[0][:30] in driver.text
        for key, title, _, _ in offered():
            assert title in driver.text or not key
        await driver.press("escape")
        assert driver.line("P parameters")


@pytest.mark.parametrize("width", [60, 80, 120])
async def test_the_footer_cuts_no_word_and_names_the_screen_that_is_on(width: int) -> None:
    """Where there is no room the rate goes first, then the last screens, digit and name."""
    async with shown(trained(1), (width, 24)) as driver:
        driver.app.board.rate = "10 Hz"
        words = {page.title for page in driver.app.board.pages} | {"?", "help", "q", "quit", "space", "pause"}
        for page in driver.app.board.pages:
            await driver.press(str(page.place))
            said = driver.lines[-1].replace("10 Hz", "").split()
            assert page.title in said and {"?", "help"} < set(said)
            assert {word for word in said if not word.isdigit()} <= words
            named = [(word, after) for word, after in pairwise(said) if word.isdigit()]
            assert len(named) > 3 and all(after in words for _, after in named), "no digit is without its name"
            assert width < 80 or [word for word, _ in named][:7] == list("1234567") or page.place == 8


@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_a_row_of_keys_and_an_answer_end_with_a_whole_part(size: tuple[int, int]) -> None:
    source = trained(2)
    async with shown(source, size) as driver:
        for page in driver.app.board.pages:
            await driver.press(str(page.place))
            assert not driver.lines[-2].rstrip().endswith("…"), page.title
        driver.app.state.say(
            "checkpointing=layers is for your script to set: model.gradient_checkpointing_enable(); it acts on "
            "activations 86.4 MiB + logits, loss 64.0 MiB of 182.1 MiB at the peak; keeps of each layer the input "
            "only, and computes the rest again in backward"
        )
        driver.app.draw()
        assert "…" not in driver.text and "model.gradient_checkpointing_enable()" in driver.text
