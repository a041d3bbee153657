"""`gpumem-tui warm`: keep a process that has loaded what predictions need, for a while."""

from __future__ import annotations

import argparse
import sys

from ...engine.engine_registry import warm_servers
from ...engine.prediction.questions import Question
from ...engine.prediction.warm_server import start, warm_process
from ..interrupt import answered_by, raise_interrupt
from .common import add_run_flags, end_progress, seconds, tell
from .estimate import add_gpu_flag, config_and_gpu

IDLE = "10m"


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_run_flags(parser)
    add_gpu_flag(parser)
    about = f"end it when nobody has asked it for this long, such as 30m or 2h (default: {IDLE})"
    parser.add_argument("--for", metavar="TIME", dest="idle", default=IDLE, help=about)
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Start it, unless there is one already; returns when it is ready."""
    (config, card), idle_s = config_and_gpu(flags), seconds(flags.idle, "--for")
    there = warm_process()
    if there is not None:
        there.wait()
        names = ", ".join(server.name for server in warm_servers())
        sys.stdout.write(f"it is warm already: {names}; gpumem-tui stop {names} ends it\n")
        return 0
    tell("loading what predictions need")
    with answered_by(raise_interrupt):  # what is not ready yet goes with this process
        server = start(Question(config.as_dict(), card), idle_s)
    end_progress()
    sys.stdout.write(
        f"{server.name}: predictions begin at once, until nobody has asked for {flags.idle}; "
        f"gpumem-tui stop {server.name} ends it sooner\n"
    )
    return 0
