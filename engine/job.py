"""The process that starts the ranks of a job and watches over them: torch's elastic launcher.

    python -m gpumem_tui.engine.job < {"config": ..., "linger_s": ...}

One engine process a rank (`engine.service`), each with a socket of its own. If one
fails or is killed, the launcher ends the others, and this process says which it was.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import engine_registry, techniques, wire
from .config import RunConfig, UserError
from .engine_registry import EngineLock
from .launch import ORDER, READY
from .service import version
from .techniques.parallel import ranks

LOOK_EVERY_S = 0.05
FAILED = 1


def main() -> int:
    """Start the ranks and wait for their end; returns the exit code."""
    order = json.loads(sys.stdin.readline())
    config = techniques.parse_config(order["config"], "the engine")
    kind, world = _device_and_ranks(config)
    config = replace(config.with_({"parallel.ranks": world}), device=kind)
    lock = EngineLock(Path(config.model).name, "job", wire.PROTOCOL, version())
    name = lock.engine_dir.name
    os.environ[ORDER] = json.dumps({"config": config.as_dict(), "linger_s": order["linger_s"], "job": name})
    for watch in (_end_unless_told_to_stay, lambda: _say_when_ready(name, world)):
        threading.Thread(target=watch, daemon=True).start()
    try:
        return _launch(name, world, lock.engine_dir.folder)
    finally:
        engine_registry.clean()  # what killed ranks have left
        lock.release()


def _device_and_ranks(config: RunConfig) -> tuple[str, int]:
    """The kind of device that the ranks compute on, and their number.

    Raises:
        UserError: There are fewer GPUs.
    """
    from . import device

    kind = device.select(config.device).type
    if kind == "cpu":
        return kind, ranks(config, 0)
    import torch

    if config.device not in ("auto", "cuda"):
        raise UserError(f"--device {config.device}: ranks take the GPUs from the first on; set CUDA_VISIBLE_DEVICES")
    there = torch.cuda.device_count()
    wanted = ranks(config, there)
    if wanted > there:
        raise UserError(f"parallel.ranks={wanted}: this machine has {there} CUDA GPU{'' if there == 1 else 's'}")
    return kind, wanted


def _launch(name: str, world: int, folder: Path) -> int:
    """Run the elastic launcher until all ranks have ended."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
        ),
        sys.executable,
    )
    try:
        launch("-P", "-m", "gpumem_tui.engine.service")
    except ChildFailedError as error:
        sys.stdout.write(f"{_first_failure(error)}\n")
        return FAILED
    except SignalException:  # the ranks have been told, and have ended
        return 0
    return 0


def _first_failure(error: Any) -> str:
    """The rank that was first to end, and its ending; the launcher knows of all that had ended when it looked."""
    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    code = failure.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"rank {rank}, process {failure.pid}: {how}"


def _say_when_ready(name: str, world: int) -> None:
    """Tell whoever started us once every rank listens."""
    never = threading.Event()
    while not _all_listen(name, world):
        never.wait(LOOK_EVERY_S)
    _say(f"{READY}{name}\n")


def _all_listen(name: str, world: int) -> bool:
    there = [job for job in engine_registry.jobs() if job.name == name]
    return bool(there) and len(there[0].members) == world and all(e.socket.exists() for e in there[0].members)


def _end_unless_told_to_stay() -> None:
    """The end of standard input is that of whoever started us; the ranks end with us."""
    if not sys.stdin.readline():
        os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _reported(run: Callable[[], int]) -> int:
    try:
        return run()
    except UserError as error:
        _say(f"{error}\n")
        return 2


if __name__ == "__main__":
    code = _reported(main)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever started us is not there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)
