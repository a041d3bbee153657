"""Starting an engine in a process of its own, and learning how it ended."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys

from .config import RunConfig, UserError
from .engine_registry import EngineDir, runtime_folder

READY = "gpumem-tui engine listens: "
"""What a new engine says on its standard output, with its name, before that becomes its log."""
REAP_WITHIN_S = 2.0


class Launcher:
    """Starts engines for one viewer.

    Args:
        linger_s: See `Linger`; None: as by default.
    """

    def __init__(self, linger_s: float | None = None) -> None:
        self._linger_s = linger_s
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, config: RunConfig) -> EngineDir:
        """Start one, training `config`; returns when it listens.

        A session of its own: what ends the terminal's session does not reach it.

        Raises:
            UserError: It did not come up.
        """
        self.let_go()
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "gpumem_tui.engine.service"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        order = {"config": config.as_dict(), "linger_s": self._linger_s}
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(order).encode())
        with process.stdout:  # ends when the engine turns it into its log, or with the engine
            said = process.stdout.read().decode(errors="replace")
        last = said.strip().rpartition("\n")[2]
        if not last.startswith(READY):
            raise UserError(f"the engine did not come up: {last or self.ending()}")
        return EngineDir(runtime_folder() / last.removeprefix(READY))

    def ending(self) -> str:
        """How the engine started last has ended: `killed by SIGKILL`; empty if it was not started from here."""
        process = self._process
        if process is None:
            return ""
        try:
            code = process.wait(REAP_WITHIN_S)
        except subprocess.TimeoutExpired:
            return ""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" if code else ""

    def let_go(self) -> None:
        """Detach: it outlives us, which is what it is for."""
        if self._process is not None and self._process.poll() is None:
            self._process.returncode = 0  # no warning about a child that is still running
        self._process = None
