"""`gpumem-tui` itself, and `gpumem-tui open`: the app on an engine or on recordings."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...engine.config import UserError
from ...engine.user_folders import state_folder
from ..hang_up import end_with_terminal
from ..interrupt import answered_by
from ..settings import Settings, automatic_hz
from ..terminal_background import asked_background
from . import frames
from .common import add_run_flags, config_from, opened, seconds
from .job_run import job_of

if TYPE_CHECKING:
    from ...engine.config import RunConfig
    from ...engine.feed import Source
    from ...engine.job_source import JobSource
    from ...engine.launch import Launcher
    from ..app import GpumemApp

SLOWEST_HZ, FASTEST_HZ = 0.1, 60.0
PRINTED_AFTERWARDS_BYTES = 8192


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the app."""
    add_run_flags(parser)
    parser.add_argument("--linger", metavar="TIME", help="end the engine this long after the last viewer has left: "
                        "90, 10m, 2h (default: 10 minutes after that and after its steps are done)")  # fmt: skip
    add_display_flags(parser)
    frames.add_flags(parser)
    parser.set_defaults(command=main)


def add_open(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `open`."""
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="a .gpumem recording, or a snapshot of PyTorch's (.pickle or .json); j shows the next of several",
    )
    add_display_flags(parser)
    frames.add_flags(parser)
    parser.set_defaults(command=open_recordings)


def add_display_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of drawing."""
    on = argparse.BooleanOptionalAction
    parser.add_argument("--hz", type=float, help="refreshes a second (default: 10, over SSH 4)")
    parser.add_argument("--theme", choices=("auto", "dark", "light", "ansi"), help="colours (default: auto)")
    parser.add_argument("--ascii", action=on, help="draw without Unicode blocks")
    parser.add_argument("--mouse", action=on, help="take the mouse; without, the terminal selects text as always")


def main(flags: argparse.Namespace) -> int:
    """Train in a process of its own, and watch; without a terminal, in this one."""
    settings = display_settings(flags)
    config = config_from(flags, profile=str(settings["profile"]))
    linger_s = seconds(flags.linger, "--linger") if flags.linger else None
    if frames.wanted(flags):
        return _printed(config, flags, settings)
    require_terminal()
    if flags.device not in ("auto", "cpu"):
        from ...engine import device

        device.select(flags.device)  # worth torch's import: the app could show nothing without it
    from ...engine.job_source import JobSource
    from ...engine.launch import Launcher
    from ...engine.service import version

    launcher = Launcher(linger_s)
    source = JobSource(launcher, version=version())
    source.start(config)
    return view(source, launcher, settings)


def _printed(config: RunConfig, flags: argparse.Namespace, settings: Settings) -> int:
    """A run that ends with what is printed of it."""
    from ...engine.feed import Start
    from ...engine.job_source import ranks_of
    from ...engine.session import Session

    if ranks_of(config) != 1:
        with job_of(config) as source:
            return frames.show(source, flags, settings, refresh_hz(settings))
    session = Session(flags.device)
    try:
        session.command(Start(config))
        return frames.show(session, flags, settings, refresh_hz(settings))
    finally:
        session.close()


def view(source: JobSource, launcher: Launcher, settings: Settings, started: bool = True) -> int:
    """Show an engine's process, and see to it that it ends if it was told to; returns the exit code.

    Args:
        source: The engine, or the ranks of a job.
        launcher: What starts engines for `source`; one that it has started ends
            with an app that was interrupted, or never came to be seen.
        settings: The config file, and what was typed.
        started: The engine has been started just now.
    """
    from ...engine.feed import ViewerRole
    from ...engine.service import END_WITHIN_S

    try:
        app = show(source, settings, launcher.let_stay, started)
        # It has an orderly end of so many seconds, and then a disorderly one.
        ended = app.ended and source.wait_ended(2 * END_WITHIN_S)
        if app.interrupted and source.role is ViewerRole.ATTACHED:
            launcher.kill()
    finally:
        if not launcher.stays:
            launcher.kill()
        source.close()
    engine_dir = source.engine_dir
    if engine_dir is not None and not ended and engine_dir.alive():
        info = engine_dir.info()
        sys.stderr.write(goes_on(engine_dir.name, ours=info is None or info.kind != "watch"))
    return app.return_code or 0


def goes_on(name: str, ours: bool) -> str:
    """The ways back to an engine that was left, a line each: a terminal would wrap a longer one within a word.

    Args:
        name: Of the engine.
        ours: It is not somebody's own script, and can be ended from here.
    """
    way_out = f"to end it:       gpumem-tui stop {name}\n" if ours else ""
    return f"{name} goes on\nto see it again: gpumem-tui attach {name}\n{way_out}"


def open_recordings(flags: argparse.Namespace) -> int:
    """Show recordings, the first one first."""
    settings = display_settings(flags)
    found = opened([Path(name) for name in flags.files])
    if frames.wanted(flags):
        return frames.show(found, flags, settings, refresh_hz(settings))
    require_terminal()
    return show(found, settings).return_code or 0


def display_settings(flags: argparse.Namespace) -> Settings:
    """The config file, and above it what was typed."""
    settings = Settings.load()
    for name, value in (("theme", flags.theme), ("refresh", flags.hz), ("ascii", flags.ascii), ("mouse", flags.mouse)):
        if value is not None:
            settings.values[name] = value
    if flags.hz is not None and not SLOWEST_HZ <= flags.hz <= FASTEST_HZ:
        raise UserError(f"--hz {flags.hz:g}: takes a number from {SLOWEST_HZ:g} to {FASTEST_HZ:g}")
    return settings


def refresh_hz(settings: Settings) -> float:
    """Refreshes a second: as set, or as the link allows."""
    if set_hz := float(settings["refresh"]):
        return max(set_hz, SLOWEST_HZ)
    return automatic_hz()


def require_terminal() -> None:
    """Refuse to draw where nobody could answer.

    Raises:
        UserError: Standard input or output is no terminal.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("this is no terminal; to run without the app: gpumem-tui run")


def show(
    source: Source, settings: Settings, on_shown: Callable[[], object] = lambda: None, started: bool = True
) -> GpumemApp:
    """The app, until it is quit.

    Args:
        source: What is shown.
        settings: The config file, and what was typed.
        on_shown: Called once it is seen.
        started: The engine has been started just now.
    """
    with asked_background(settings["theme"] == "auto") as background:
        from ..app import GpumemApp

        found = background()
    from ..prediction_client import Background

    with closing(Background(source, str(settings["gpu"]))) as predictions, _native_output_kept():
        note = tour_note() if source.live else None
        app = GpumemApp(
            source, refresh_hz=refresh_hz(settings), settings=settings, background=found,
            predictions=predictions, tour=partial(_touch, note) if note else None, on_shown=on_shown,
            started=started,
        )  # fmt: skip
        gc.freeze()  # what has been imported stays: no collection need look at it again while frames are due
        end_with_terminal(sys.stdin.fileno())
        with answered_by(app.interrupt_by_signal):
            app.run(mouse=bool(settings["mouse"]))
    return app


def tour_note() -> Path | None:
    """The file that is to say that the tour has been seen; None if it does, or cannot be: better never than always."""
    folder = state_folder()
    if folder is None:
        return None
    path = folder / "tour-seen"
    try:
        if path.exists():
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path.parent, os.W_OK) else None


def _touch(path: Path) -> None:
    with suppress(OSError):
        path.touch()


@contextmanager
def _native_output_kept() -> Iterator[None]:
    """Keep what libraries print to the standard error off the screen, and print it afterwards.

    Textual draws on `sys.__stderr__`, so that gets a descriptor of its own for
    the terminal, which standard output is known to be (`2> file` must not get
    the screen), and descriptor 2 becomes a file as long as the app is up. The
    file has no name and needs no folder: a terminal that is closed leaves none behind.
    """
    with os.fdopen(os.memfd_create("gpumem-tui errors"), "w+b") as log:
        terminal, errors, before = os.dup(1), os.dup(2), sys.__stderr__
        os.dup2(log.fileno(), 2)
        try:
            with os.fdopen(terminal, "w", encoding="utf-8") as screen:
                sys.__stderr__ = screen  # type: ignore[misc]
                yield
        finally:
            sys.__stderr__ = before  # type: ignore[misc]
            os.dup2(errors, 2)
            os.close(errors)
            log.seek(-min(log.seek(0, os.SEEK_END), PRINTED_AFTERWARDS_BYTES), os.SEEK_END)
            sys.stderr.write(log.read().decode(errors="replace"))
