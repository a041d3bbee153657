"""Everything that can be done: one definition each, seen in keys, help and command palette."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.exports import registry
from gpumem_tui.engine.recording import Recording
from gpumem_tui.tui.actions import RESERVED, Action, help_lines, offered_here, shown_keys
from gpumem_tui.tui.board import Board, check
from gpumem_tui.tui.draw import wrap
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.screens import screens
from gpumem_tui.tui.settings import Settings

from .app_driver import RECORDINGS, shown, trained
from .fake_source import FakeSource

NOWHERE = Path("/proc/none/config.toml")


def board(**keys: tuple[str, ...]) -> Board:
    settings = Settings(NOWHERE)
    settings.keys = keys
    return Board(FakeSource(), settings, Palette())


def opened() -> Recording:
    return Recording(RECORDINGS / "full.gpumem", RECORDINGS / "lora.gpumem")


SCREENS = [kind.title for kind in screens()]


def test_every_screen_has_a_digit_of_its_own() -> None:
    assert [kind.place for kind in screens()] == [*range(1, len(SCREENS) + 1)]
    assert SCREENS[0] == "live"


def actions_of(screen: str) -> list[Action]:
    made = board()
    (page,) = (page for page in made.pages if page.title == screen)
    return [*page.actions, *made.everywhere]


@pytest.mark.parametrize("screen", SCREENS)
def test_an_action_has_a_key_a_palette_entry_and_a_help_line(screen: str) -> None:
    for action in actions_of(screen):
        assert action.name and action.title and action.text
        assert action.keys or action.name.startswith("change."), "letters run out"
        assert action.title[0].isupper() or not action.title[0].isalpha() or "." in action.name


@pytest.mark.parametrize("screen", SCREENS)
def test_no_two_actions_of_a_screen_share_a_key_a_name_or_a_title(screen: str) -> None:
    actions = actions_of(screen)
    for what in (
        [key for action in actions for key in action.keys],
        [action.name for action in actions],
        [action.title for action in actions],
    ):
        assert sorted(what) == sorted(set(what))
    assert not {key for action in actions for key in action.keys} & set(RESERVED)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("recordings", [False, True])
async def test_help_lists_every_action_of_the_screen_it_is_called_from(screen: str, recordings: bool) -> None:
    """What takes an engine where there is one, what takes several recordings where they are."""
    async with shown(opened() if recordings else trained(), (100, 200)) as driver:
        await driver.press(str(SCREENS.index(screen) + 1), "?")
        text = " ".join(driver.text.split())
        actions = (*driver.app.board.pages[SCREENS.index(screen)].actions, *driver.app.board.everywhere)
        offered = offered_here(actions, not recordings, recordings, True)
        assert offered != actions
        for action in actions:
            assert (wrap(action.text, 60)[0] in text) == (action in offered and bool(action.keys))
            if action in offered and action.keys:
                assert shown_keys([action]).split()[0] in text


@pytest.mark.parametrize("recordings", [False, True])
async def test_the_command_palette_offers_every_action_and_does_it(recordings: bool) -> None:
    async with shown(opened() if recordings else trained()) as driver:
        await driver.press("5")
        offered = {command.title: command for command in driver.app.get_system_commands(driver.app.screen)}
        actions = (*driver.app.board.page.actions, *driver.app.board.everywhere)
        exports = {f"Export the run: {name}" for name in registry()}
        titles = {action.title for action in offered_here(actions, not recordings, recordings, True)}
        assert set(offered) == titles | exports
        await driver.pilot.press(":")
        await driver.pilot.pause()
        assert len(driver.app.screen_stack) == 2
        await driver.pilot.press("tab", "escape")
        await driver.pilot.pause()
        assert len(driver.app.screen_stack) == 1
        offered["Screen: events"].callback()
        assert driver.app.board.page.title == "events"


async def test_keys_are_remapped() -> None:
    settings = Settings(NOWHERE)
    settings.keys = {"help": ("f2", "f1"), "step.zoom-in": ("a",), "screen.step": ("ctrl+o",)}
    async with shown(trained(), (80, 80), settings=settings) as driver:
        await driver.press("f1")
        assert driver.app.board.page.title == "help"
        assert "f2 f1" in driver.text
        await driver.press("?")
        assert driver.app.board.page.title == "help", "the default key is free now"
        await driver.press("f1", "ctrl+o")
        assert driver.app.board.page.title == "step"
        await driver.press("a")
        assert "50 % of it" in driver.text


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"sav": ("S",)}, "keys.sav: there is no such action; did you mean save[?]"),
        ({"foo": ("S",)}, "keys.foo: there is no such action; known: change[.]…, compare[.]…, copy, "),
        ({"save": ("ctrl+b",)}, "ctrl[+]b belongs to tmux"),
        ({"save": ("q",)}, "keys.save: q is quit's already"),
        ({"stop": ("p",)}, "keys.stop: p is step.peak's already"),
    ],
)
def test_keys_that_cannot_be_are_refused_in_one_line(keys: dict[str, Any], problem: str) -> None:
    settings = Settings(NOWHERE)
    settings.keys = keys
    with pytest.raises(UserError, match=problem) as caught:
        check(settings)
    assert str(caught.value).startswith(str(NOWHERE))
    assert "\n" not in str(caught.value)


async def test_every_key_of_every_screen_can_be_pressed(tmp_path: Path) -> None:
    """Nothing raises, and nothing but quitting ends the app; twice, as many keys turn something on and off."""
    source = trained(2, checkpointing="layers")
    async with shown(source, save_dir=tmp_path) as driver:
        for screen in SCREENS:
            for action in actions_of(screen):
                if action.name in ("quit", "palette", "pause") or not action.keys:
                    continue
                driver.app.board.page = driver.app.board.pages[SCREENS.index(screen)]
                driver.app.action_press(action.keys[0])
                driver.app.action_press(action.keys[0])
                driver.app.board.page.typing = False
                assert "cannot be drawn" not in driver.text, action
        assert driver.app.is_running


@pytest.mark.parametrize("screen", SCREENS)
async def test_what_is_selected_is_explained_in_sixty_words(screen: str) -> None:
    source = trained(3, checkpointing="layers")
    async with shown(source) as driver:
        await driver.press(str(SCREENS.index(screen) + 1))
        topics = set()
        for _ in range(24):
            topic = driver.app.board.page.topic()
            topics.add(topic.title)
            assert 3 < len(topic.text.split()) <= 60, topic
            await driver.press("down")
        if screen in ("live", "techniques"):
            assert len(topics) > 8
        before = driver.app.board.page.topic()
        await driver.press("?")
        assert before.title in driver.lines[1]
        assert before.text.split(". ")[0][:50] in driver.text


async def test_a_key_that_the_help_lists_closes_it_and_acts() -> None:
    source = trained()
    async with shown(source) as driver:
        await driver.press("?", "k")
        assert driver.app.board.page.title == "live"
        assert driver.last_start.config["checkpointing"] == "layers"
        await driver.press("4", "l", "?", "z")
        assert driver.app.control.changes.pending == {}, "undo is the screen's that the help is called from"
        await driver.press("down")
        assert driver.app.board.page.title == "help", "arrows scroll"


async def test_a_letter_of_other_screens_says_where_it_has_a_meaning() -> None:
    source = trained()
    async with shown(source, (120, 40)) as driver:
        await driver.press("2", "k")
        assert "k does nothing here, elsewhere: checkpointing: next value (live, techniques)" in driver.text
        await driver.press("?", "D")
        assert "D does nothing here, elsewhere: data type: value before (live, techniques)" in driver.text
        await driver.press("j")
        assert "recording" in driver.text
        await driver.press("%")
        assert "% does nothing here; ? lists the keys" in driver.text
        assert source.commands == []


@pytest.mark.parametrize("screen", ["live", "techniques"])
async def test_a_stranger_finds_the_way_around_on_the_first_page_of_the_help(screen: str) -> None:
    async with shown(trained()) as driver:
        await driver.press(str(SCREENS.index(screen) + 1), "?")
        for key in (f"1…{len(SCREENS)}", "?", "q", "esc", "space", ": ctrl+p"):
            assert driver.line(f"{key}  "), key


@pytest.mark.parametrize("screen", SCREENS)
def test_the_keys_of_a_line_of_the_help_are_not_wrapped(screen: str) -> None:
    assert all(text for _, text in help_lines(actions_of(screen)))
