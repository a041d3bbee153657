"""`gpumem-tui stop`: end an engine, whatever its version, or a server that `gpumem-tui warm` has left."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time

from ...engine import engine_registry
from ...engine.config import UserError
from ...engine.engine_registry import EngineDir
from ...engine.service import END_WITHIN_S
from ...engine.wire import listener_pid

LOOK_EVERY_S = 0.02


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("engine", metavar="NAME|PID", nargs="?", help="which engine, if there are several")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """End it; returns when nothing of it is left."""
    job = engine_registry.find(flags.engine, servers=True)
    pids = {engine_dir: _pid(engine_dir) for engine_dir in job.members}
    for number in (signal.SIGTERM, signal.SIGKILL):  # the second for what is stopped, or deep in a driver
        for engine_dir, pid in pids.items():
            _signal(engine_dir, pid, number)
        if all(_gone(engine_dir, 2 * END_WITHIN_S) for engine_dir in pids):
            engine_registry.clean()
            sys.stdout.write(f"{job.name} has ended\n")
            return 0
    raise UserError(f"{job.name} does not end, not even killed: process {', '.join(map(str, pids.values()))}")


def _pid(engine_dir: EngineDir) -> int:
    """The process to be ended.

    Raises:
        UserError: It is not known, or not ours to end.
    """
    info = engine_dir.info()
    if info is None:
        raise UserError(f"{engine_dir.name} does not say what its process is")
    if info.kind == "watch":
        raise UserError(f"{engine_dir.name} is a script of your own, process {info.pid}: end it as you started it")
    if listener_pid(engine_dir.socket) not in (None, info.pid):  # whoever is named there has nothing to do with it
        raise UserError(f"{engine_dir.name} is not process {info.pid}, as {engine_dir.folder}/card.json says")
    return info.pid


def _signal(engine_dir: EngineDir, pid: int, number: signal.Signals) -> None:
    if not engine_dir.alive():
        return
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended
    except OSError as error:
        raise UserError(f"{engine_dir.name}: process {pid} cannot be ended: {error.strerror}") from None


def _gone(engine_dir: EngineDir, within_s: float) -> bool:
    until_s, never = time.monotonic() + within_s, threading.Event()
    while engine_dir.alive():
        if time.monotonic() > until_s:
            return False
        never.wait(LOOK_EVERY_S)
    return True
