"""`gpumem-tui stop`: end an engine, whatever its version."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time

from ...engine import whereabouts
from ...engine.config import UserError
from ...engine.service import END_WITHIN_S
from ...engine.whereabouts import Place

LOOK_EVERY_S = 0.02


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("engine", metavar="NAME|PID", nargs="?", help="which engine, if there are several")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """End it; returns when nothing of it is left."""
    place = whereabouts.find(flags.engine)
    card = place.card()
    if card is None:
        raise UserError(f"{place.name} does not say what its process is")
    if card.kind == "watch":
        raise UserError(f"{place.name} is a script of your own, process {card.pid}: end it as you started it")
    os.kill(card.pid, signal.SIGTERM)
    if not _gone(place, 2 * END_WITHIN_S):
        os.kill(card.pid, signal.SIGKILL)  # stopped, or deep in a driver
        if not _gone(place, END_WITHIN_S):
            raise UserError(f"process {card.pid} does not end, not even killed")
    whereabouts.clean()
    sys.stdout.write(f"{place.name} has ended\n")
    return 0


def _gone(place: Place, within_s: float) -> bool:
    until_s, never = time.monotonic() + within_s, threading.Event()
    while place.alive():
        if time.monotonic() > until_s:
            return False
        never.wait(LOOK_EVERY_S)
    return True
