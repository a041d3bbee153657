"""The program in a real terminal (a pty): what it writes there, byte by byte."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .benchmarks.terminal import RECORDING, TUI, Terminal
from .terminal import Terminal as Program
from .viewing import SMALL
from .vt import Screen

COLOUR = re.compile(rb"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")


@contextmanager
def opened(*flags: str, **environment: str) -> Iterator[Terminal]:
    """A recording in the app; ends it afterwards."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        terminal = Terminal([*TUI, "open", str(RECORDING), *flags], (80, 24))
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        assert terminal.read_for(60, until=b"parameters") is not None, terminal.tail
        yield terminal
    finally:
        terminal.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_no_color_sends_no_colour_on_any_screen_nor_in_the_palette() -> None:
    with opened(NO_COLOR="1") as terminal:
        seen = terminal.tail
        for key, expected in (("2", b"largest now"), ("3", b"all at once"), ("4", b"if changed"), (":", b"Search")):
            terminal.press(key)
            assert terminal.read_for(60, until=expected) is not None, terminal.tail
            seen += terminal.tail
        assert not COLOUR.findall(seen)


def test_colours_are_sent_otherwise() -> None:
    with opened() as terminal:
        assert COLOUR.search(terminal.tail)


def test_nothing_is_written_when_nothing_changes_and_q_ends_it() -> None:
    # A prediction that is there is something new, whenever it comes: none is asked for.
    subprocess.run([*TUI, "config", "set", "predict=off"], check=True, capture_output=True)
    with opened("--hz", "20") as terminal:
        quiet = (terminal.bytes_in(1.5) for _ in range(20))
        assert 0 in quiet, "it never comes to rest"
        assert terminal.bytes_in(5) == 0
        terminal.press("q")
        terminal.read_for(60, until=b"\x1b[?1049l")
        assert terminal.process.wait(30) == 0


def test_the_terminal_shows_what_the_app_says_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows drawn by the compositor and cells sent past it, over each other, on a real terminal."""
    monkeypatch.chdir(tmp_path)
    # A prediction that comes between the picture and the look at the terminal would be on one of them alone.
    subprocess.run([*TUI, "config", "set", "predict=off"], check=True, capture_output=True)
    with opened("--hz", "20") as terminal:
        screen = Screen(80, 24)
        screen.feed(terminal.tail.decode())
        for key, expected in (
            ("2", b"largest now"),
            ("p", b""),
            ("+", b" % of it"),
            ("3", b"all at once"),
            ("\x1b[B", b""),
            (":", b"Search"),
            ("\x1b", b"all at once"),
            ("v", b"theme dark"),
            ("?", b"keys on"),
            ("?", b""),
            ("4", b"if changed"),
            ("i", b"saved"),
        ):
            terminal.press(key)
            assert not expected or terminal.read_for(60, until=expected) is not None, (key, terminal.tail)
            terminal.read_for(0.3)
            screen.feed(terminal.tail.decode())
        (saved,) = tmp_path.glob("gpumem-techniques-*.txt")
        said = saved.read_text().splitlines()
        assert said[3:20] == screen.lines[3:20]
        assert len({line for line in said if line}) > 15


def test_the_screen_is_on_the_terminal_though_errors_go_to_a_file(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    command = shlex.join([*TUI, "open", str(RECORDING)])
    terminal = Terminal(["sh", "-c", f"exec {command} 2> {errors}"], (80, 24))
    try:
        assert terminal.read_for(60, until=b"parameters") is not None, terminal.tail
    finally:
        terminal.close()
    assert errors.read_bytes() == b""


def test_ctrl_c_ends_a_run_without_the_app_in_order(tmp_path: Path) -> None:
    terminal = Program("run", *SMALL, "--steps", "100000", environment={}, folder=tmp_path)
    try:
        terminal.sees("step 2")
        terminal.press("\x03")
        assert terminal.wait() == 130, terminal.output[-500:]
        assert b"terminate called" not in terminal.output
    finally:
        terminal.close()
