"""Starting an engine in a process of its own, and learning how it ended."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from .config import RunConfig, UserError
from .engine_registry import EngineDir, Job, clean, find, jobs, runtime_folder

READY = "gpumem-tui engine listens: "
"""The line, ended by its name, that a new engine writes to its standard output before that becomes its log."""
ORDER = "GPUMEM_TUI_ORDER"
"""The environment's name for what the ranks of a job are to run."""
STAY = b"stay\n"
"""The message to an engine, after its order, that makes it outlive the process that started it."""
REAP_WITHIN_S = 15.0
RANKS_END_WITHIN_S = 5.0
LOOK_EVERY_S = 0.02


class Launcher:
    """Starts engines for one viewer.

    An engine ends with the process that started it, however that dies, until
    it is told to stay: the pipe that its order came through stays open till then.

    Args:
        linger_s: See `Linger`; None: as by default.

    Attributes:
        stays: Whether it has been told to.
    """

    def __init__(self, linger_s: float | None = None) -> None:
        self._linger_s = linger_s
        self._process: subprocess.Popen[bytes] | None = None
        self._job = ""
        self.stays = False

    def __call__(self, config: RunConfig) -> EngineDir:
        """Start one, training `config`; returns when it listens.

        A session of its own: what ends the terminal's session does not reach it.

        Raises:
            UserError: It did not come up.
        """
        self._job = ""
        name = self._listening("gpumem_tui.engine.service", config)
        assert self._process is not None
        self._close(self._process.stdout)  # it is the engine's log from here on
        return EngineDir(runtime_folder() / name)

    def job(self, config: RunConfig) -> Job:
        """Start an engine for each rank of `config`; returns when all listen.

        Raises:
            UserError: One did not come up; none is left.
        """
        self._job = self._listening("gpumem_tui.engine.job", config)
        return find(self._job)

    def _listening(self, module: str, config: RunConfig) -> str:
        """The name under which what has been started listens."""
        if self._process is not None:
            self.let_go()
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],  # -P: nothing of the folder one is in stands in for a library
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        order = {"config": config.as_dict(), "linger_s": self._linger_s}
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        said = ""
        # Ends with its life, or with an engine turning its output into its log; a job's goes on.
        for line in process.stdout:
            said = line.decode(errors="replace").strip() or said
            if said.startswith(READY):
                break
        if self.stays:
            self.let_stay()
        if not said.startswith(READY):
            self._close(process.stdout)
            raise UserError(f"the engine did not come up: {said or self.ending()}")
        return said.removeprefix(READY)

    def ending(self) -> str:
        """The ending of the engine started last: `killed by SIGKILL`; empty if it was not started from here.

        Of a job, the rank that was first to end: `rank 1, process 123: killed by SIGKILL`.
        """
        process = self._process
        if process is None:
            return ""
        try:
            code = process.wait(REAP_WITHIN_S)
        except subprocess.TimeoutExpired:
            return ""
        if process.stdout is not None and not process.stdout.closed:
            with process.stdout:
                said = process.stdout.read().decode(errors="replace").strip()
            if said:
                return said.rpartition("\n")[2]
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" if code else ""

    def let_stay(self) -> None:
        """Let engines outlive this process from now on, also those started later: somebody has seen one."""
        self.stays = True
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(OSError), process.stdin:
                process.stdin.write(STAY)

    def let_go(self) -> None:
        """Detach: the engine outlives us, which is what it is for."""
        self.let_stay()
        if self._process is not None:
            self._close(self._process.stdout)
            if self._process.poll() is None:
                self._process.returncode = 0  # no warning about a child that is still running
        self._process = None

    def kill(self) -> None:
        """End the engine started last at once, and remove what it leaves; returns when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._close(process.stdin)
        self._close(process.stdout)
        self._wait_for_ranks()
        clean()

    @staticmethod
    def _close(pipe: IO[bytes] | None) -> None:
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()

    def _wait_for_ranks(self) -> None:
        """Ranks end by themselves once what has started them has gone."""
        until_s, never = time.monotonic() + RANKS_END_WITHIN_S, threading.Event()
        while any(job.name == self._job for job in jobs()) and time.monotonic() < until_s:
            never.wait(LOOK_EVERY_S)
