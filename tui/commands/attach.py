"""`gpumem-tui attach`: the app on an engine that is running."""

from __future__ import annotations

import argparse

from .app import add_display_flags, display_settings, require_terminal, view


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("engine", metavar="NAME|PID", nargs="?", help="which engine, if there are several")
    parser.add_argument("--take", action="store_true", help="command it, and have the viewer that does now only look")
    add_display_flags(parser)
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Attach."""
    from ...engine import engine_registry
    from ...engine.job_source import JobSource
    from ...engine.launch import Launcher
    from ...engine.service import version

    job = engine_registry.find(flags.engine)
    require_terminal()
    info = job.members[0].info()
    launcher = Launcher()
    source = JobSource(None if info and info.kind == "watch" else launcher, take=flags.take, version=version())
    source.attach(job)
    return view(source, launcher, display_settings(flags), started=False)
