"""Starting an engine in a process of its own, and learning how it ended."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys

from .config import RunConfig, UserError
from .engine_registry import EngineDir, clean, runtime_folder

READY = "gpumem-tui engine listens: "
"""The line, ended by its name, that a new engine writes to its standard output before that becomes its log."""
STAY = b"stay\n"
"""The message to an engine, after its order, that makes it outlive the process that started it."""
REAP_WITHIN_S = 2.0


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
        self.stays = False

    def __call__(self, config: RunConfig) -> EngineDir:
        """Start one, training `config`; returns when it listens.

        A session of its own: what ends the terminal's session does not reach it.

        Raises:
            UserError: It did not come up.
        """
        if self._process is not None:
            self.let_go()
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "gpumem_tui.engine.service"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        order = {"config": config.as_dict(), "linger_s": self._linger_s}
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        with process.stdout:  # ends when the engine turns it into its log, or with the engine
            said = process.stdout.read().decode(errors="replace")
        last = said.strip().rpartition("\n")[2]
        if self.stays:
            self.let_stay()
        if not last.startswith(READY):
            raise UserError(f"the engine did not come up: {last or self.ending()}")
        return EngineDir(runtime_folder() / last.removeprefix(READY))

    def ending(self) -> str:
        """The ending of the engine started last: `killed by SIGKILL`; empty if it was not started from here."""
        process = self._process
        if process is None:
            return ""
        try:
            code = process.wait(REAP_WITHIN_S)
        except subprocess.TimeoutExpired:
            return ""
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
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = 0  # no warning about a child that is still running
        self._process = None

    def kill(self) -> None:
        """End the engine started last at once, and remove what it leaves; returns when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        clean()
