"""`gpumem-tui` itself, and `gpumem-tui open`: the app on an engine or on a recording."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.config import UserError
from ...engine.feed import Source
from ...engine.launch import Launcher
from ...engine.recording import Replay
from ...engine.remote import Remote
from ...engine.service import END_WITHIN_S, version
from .common import add_run_flags, config_from, seconds

if TYPE_CHECKING:
    from ..app import GpumemApp

LOCAL_HZ, SSH_HZ = 10.0, 4.0
PRINTED_AFTERWARDS_BYTES = 8192


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the app."""
    add_run_flags(parser)
    parser.add_argument("--linger", metavar="TIME", help="end the engine this long after the last viewer has left: "
                        "90, 10m, 2h (default: 10 minutes after that and after its steps are done)")  # fmt: skip
    add_display_flags(parser)
    parser.set_defaults(command=main)


def add_open(parser: argparse.ArgumentParser) -> None:
    """Flags of `open`."""
    parser.add_argument("file", metavar="FILE", help="a .gpumem recording")
    add_display_flags(parser)
    parser.set_defaults(command=open_recording)


def add_display_flags(parser: argparse.ArgumentParser) -> None:
    """How the app draws."""
    parser.add_argument("--hz", type=float, help="refreshes a second (default: 10, over SSH 4)")
    parser.add_argument("--ascii", action="store_true", help="draw without Unicode blocks")


def main(flags: argparse.Namespace) -> int:
    """Train in a process of its own, and watch."""
    config = config_from(flags)
    linger_s = seconds(flags.linger, "--linger") if flags.linger else None
    require_terminal()
    if flags.device not in ("auto", "cpu"):
        from ...engine import device

        device.select(flags.device)  # worth torch's import: the app could show nothing without it
    remote = Remote(launch=Launcher(linger_s), version=version())
    remote.start(config)
    return view(remote, flags)


def view(remote: Remote, flags: argparse.Namespace) -> int:
    """Show an engine's process, and see to it that it ends if it was told to."""
    try:
        app = show(remote, flags)
        # It has an orderly end of so many seconds, and then a disorderly one.
        ended = app.ended and remote.wait_ended(2 * END_WITHIN_S)
    finally:
        remote.close()
    place = remote.place
    if place is not None and not ended and place.alive():
        card = place.card()
        way_out = "" if card and card.kind == "watch" else f"; to end it: gpumem-tui stop {place.name}"
        sys.stderr.write(f"{place.name} goes on; to see it again: gpumem-tui attach {place.name}{way_out}\n")
    return 0


def open_recording(flags: argparse.Namespace) -> int:
    """Show a recording."""
    replay = Replay(Path(flags.file))
    require_terminal()
    show(replay, flags)
    return 0


def require_terminal() -> None:
    """Refuse to draw where nobody could see it.

    Raises:
        UserError: Standard input or output is no terminal.
    """
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise UserError("this is no terminal; to run without the app: gpumem-tui run")


def show(source: Source, flags: argparse.Namespace) -> GpumemApp:
    """The app, until it is quit."""
    from ..app import GpumemApp

    hz = flags.hz or (SSH_HZ if "SSH_CONNECTION" in os.environ else LOCAL_HZ)
    if hz <= 0:
        raise UserError(f"--hz {hz:g}: takes a number above 0")
    with _native_output_kept():
        app = GpumemApp(source, refresh_hz=hz, save_dir=Path.cwd(), ascii=flags.ascii)
        app.run(mouse=False)
    return app


@contextmanager
def _native_output_kept() -> Iterator[None]:
    """Keep what libraries print to the standard error off the screen, and print it afterwards.

    Textual draws on `sys.__stderr__`, so that gets a descriptor of its own for
    the terminal, and descriptor 2 becomes a file as long as the app is up. The
    file has no name: a terminal that is closed leaves none behind.
    """
    with tempfile.TemporaryFile() as log:
        terminal, before = os.dup(2), sys.__stderr__
        os.dup2(log.fileno(), 2)
        try:
            with open(terminal, "w", encoding="utf-8", closefd=False) as screen:
                sys.__stderr__ = screen  # type: ignore[misc]
                yield
        finally:
            sys.__stderr__ = before  # type: ignore[misc]
            os.dup2(terminal, 2)
            os.close(terminal)
            log.seek(-min(log.seek(0, os.SEEK_END), PRINTED_AFTERWARDS_BYTES), os.SEEK_END)
            sys.stderr.write(log.read().decode(errors="replace"))
