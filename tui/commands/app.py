"""`gpumem-tui` itself, and `gpumem-tui open`: the app on an engine or on recordings."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.config import UserError
from ..background import asked_background
from ..settings import Settings
from . import frames
from .common import add_run_flags, config_from

if TYPE_CHECKING:
    from ...engine.feed import Source
    from ..run_summary import RunSummary

LOCAL_HZ, SSH_HZ = 10.0, 4.0


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the app."""
    add_run_flags(parser)
    _add_display_flags(parser)
    parser.set_defaults(command=main)


def add_open(parser: argparse.ArgumentParser) -> None:
    """Flags of `open`."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="a .gpumem recording; others are set beside it")
    _add_display_flags(parser)
    parser.set_defaults(command=open_recordings)


def _add_display_flags(parser: argparse.ArgumentParser) -> None:
    on = argparse.BooleanOptionalAction
    parser.add_argument("--hz", type=float, help="refreshes a second (default: 10, over SSH 4)")
    parser.add_argument("--theme", choices=("auto", "dark", "light", "ansi"), help="colours (default: auto)")
    parser.add_argument("--ascii", action=on, help="draw without Unicode blocks")
    parser.add_argument("--mouse", action=on, help="take the mouse; without, the terminal selects text as always")
    frames.add_flags(parser)


def main(flags: argparse.Namespace) -> int:
    """Train and watch."""
    settings = _settings(flags)
    config = config_from(flags, profile=str(settings["profile"]))
    _require_terminal(flags)
    from ...engine.feed import Start
    from ...engine.session import Session

    if flags.device not in ("auto", "cpu"):
        from ...engine import device

        device.select(flags.device)  # worth torch's import: the app could show nothing without it
    session = Session(flags.device)
    try:
        session.command(Start(config))
        return _show(session, flags, settings)
    finally:
        session.close()


def open_recordings(flags: argparse.Namespace) -> int:
    """Show a recording, and others beside it."""
    from ...engine.recording import Replay
    from ..run_summary import of_source

    settings = _settings(flags)
    paths = [Path(name) for name in flags.files]
    replays = [Replay(path) for path in paths]
    _require_terminal(flags)
    beside = [of_source(replay, path.stem) for replay, path in zip(replays[1:], paths[1:], strict=True)]
    return _show(replays[0], flags, settings, beside, paths[0].stem)


def _settings(flags: argparse.Namespace) -> Settings:
    """The config file, and above it what was typed."""
    settings = Settings.load()
    for name, value in (("theme", flags.theme), ("refresh", flags.hz), ("ascii", flags.ascii), ("mouse", flags.mouse)):
        if value is not None:
            settings.values[name] = value
    if flags.hz is not None and flags.hz <= 0:
        raise UserError(f"--hz {flags.hz:g}: takes a number above 0")
    return settings


def _require_terminal(flags: argparse.Namespace) -> None:
    if not frames.wanted(flags) and not sys.stdin.isatty():
        raise UserError("standard input is no terminal; to run without the app: gpumem-tui run")


def _show(
    source: Source,
    flags: argparse.Namespace,
    settings: Settings,
    beside: Sequence[RunSummary] = (),
    origin: str = "",
) -> int:
    """The app, or what was asked for instead.

    Args:
        source: What is shown.
        flags: Parsed.
        settings: The config file, and what was typed.
        beside: Recordings to compare it with.
        origin: The name of the source, if it is a recording.
    """
    hz = float(settings["refresh"]) or (SSH_HZ if "SSH_CONNECTION" in os.environ else LOCAL_HZ)
    if frames.wanted(flags):
        return frames.show(source, flags, settings, hz)
    with asked_background(settings["theme"] == "auto") as background:
        from ..app import GpumemApp, tour_unseen

        found = background()
    with _native_output_to_a_file() as log:
        app = GpumemApp(source, refresh_hz=hz, settings=settings, background=found, tour=source.live and tour_unseen())
        app.state.finished, app.state.origin = list(beside), origin
        app.run(mouse=bool(settings["mouse"]))
    if log.stat().st_size == 0:
        log.unlink()
    return 0


@contextmanager
def _native_output_to_a_file() -> Iterator[Path]:
    """Keep what libraries print to the standard error off the screen.

    Textual draws on `sys.__stderr__`, so that gets a descriptor of its own for
    the terminal, and descriptor 2 becomes a log file as long as the app is up.
    """
    handle, name = tempfile.mkstemp(prefix="gpumem-tui-", suffix=".log")
    terminal, before = os.dup(2), sys.__stderr__
    os.dup2(handle, 2)
    os.close(handle)
    try:
        with open(terminal, "w", encoding="utf-8", closefd=False) as screen:
            sys.__stderr__ = screen  # type: ignore[misc]
            yield Path(name)
    finally:
        sys.__stderr__ = before  # type: ignore[misc]
        os.dup2(terminal, 2)
        os.close(terminal)
