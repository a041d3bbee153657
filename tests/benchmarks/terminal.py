"""What the app costs a terminal: `python -m tests.benchmarks.terminal`.

Runs it under a pty and measures the CPU time of its process, the bytes it writes, how long
the first frame and `--help` take, how long a key takes to have an effect on a slow link, and
how late its ticks are beside an engine that trains. But for the last the source is made
beforehand (a run of 24 layers, a new reading and a partial trace ten times a second), so that
what is measured is the app and no engine. memray's live view and nvitop are measured the same
way if they are found on the PATH; nvitop needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil

RECORDING = Path(__file__).parent.parent / "recordings" / "full.gpumem"
ANIMATED = [sys.executable, "-m", "tests.benchmarks.animated"]
TUI = [sys.executable, "-m", "gpumem_tui.tui"]
MEMRAY_SCRIPT = "import time\nkept = []\nwhile True:\n    kept.append(bytearray(100_000)); time.sleep(0.01)\n"


class Terminal:
    """A program under a pty.

    Args:
        command: What to run.
        size: Columns and rows.
        bytes_per_s: How fast what it writes is taken; None: at once.
        truecolor: Whether it is told of 16 million colours; sshd does not pass that on.
    """

    def __init__(
        self, command: list[str], size: tuple[int, int], bytes_per_s: float | None = None, truecolor: bool = True
    ) -> None:
        self.began = time.monotonic()
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLORFGBG": "15;0"}
        if not truecolor:
            del environment["COLORTERM"]
        self.process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True, close_fds=True
        )
        os.close(side)
        self.fd, self.bytes_per_s, self.total = main, bytes_per_s, 0
        self.tail = b""

    def read_for(self, seconds: float, until: bytes = b"") -> float | None:
        """Take what comes; returns how long until a text came, None if it did not."""
        began = time.monotonic()
        while (now := time.monotonic()) - began < seconds:
            ready, _, _ = select.select([self.fd], [], [], min(0.05, seconds))
            if not ready:
                continue
            try:
                data = os.read(self.fd, 65536 if self.bytes_per_s is None else max(1, int(self.bytes_per_s / 20)))
            except OSError:
                return None
            self.total += len(data)
            self.tail = (self.tail + data)[-20_000:]
            if self.bytes_per_s is not None:
                time.sleep(len(data) / self.bytes_per_s)
            if until and until in self.tail:
                return time.monotonic() - now + (now - began)
        return None

    def bytes_in(self, seconds: float) -> int:
        """What is written in a while."""
        before = self.total
        self.read_for(seconds)
        return self.total - before

    def press(self, key: str) -> None:
        """Type."""
        self.tail = b""
        os.write(self.fd, key.encode())

    def cost(self, seconds: float) -> tuple[float, float]:
        """CPU in percent of a core, and bytes a second, for a while."""
        process = psutil.Process(self.process.pid)
        before, bytes_before, began = process.cpu_times(), self.total, time.monotonic()
        self.read_for(seconds)
        after, wall = process.cpu_times(), time.monotonic() - began
        cpu = after.user + after.system - before.user - before.system
        return 100 * cpu / wall, (self.total - bytes_before) / wall

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.fd)


def steady(seconds: float) -> None:
    """CPU and bytes while a run goes on, paused, and while nothing happens."""
    print(f"{'':<34}{'CPU %':>8}{'bytes/s':>10}")
    for size in ((80, 24), (120, 40)):
        for hz in (10, 4):
            terminal = Terminal([*ANIMATED, "--hz", str(hz)], size)
            terminal.read_for(4)
            _told(f"live, {size[0]}x{size[1]}, {hz} Hz", terminal, seconds)
            if hz == 10:
                terminal.press(" ")
                terminal.read_for(1)
                _told(f"live, {size[0]}x{size[1]}, view paused", terminal, seconds)
            terminal.close()
    terminal = Terminal([*TUI, "open", str(RECORDING), "--hz", "10"], (80, 24))
    written = -1
    while written != terminal.total:  # until what saves most has been worked out, which is shown as it goes on
        written = terminal.total
        terminal.read_for(10)
    _told("a recording, nothing changes", terminal, seconds)
    terminal.close()


def _told(name: str, terminal: Terminal, seconds: float) -> None:
    """CPU and bytes: the median of five parts of the time."""
    cpu, rate = zip(*(terminal.cost(seconds / 5) for _ in range(5)), strict=True)
    print(f"{name:<34}{statistics.median(cpu):>8.2f}{statistics.median(rate):>10,.0f}")


def starts(times: int) -> None:
    """Time to the first frame, and of `--help`: the best and the median, of starts after the first one ever.

    The first one writes Python's bytecode, as it does where it is installed.
    """
    frames, helps, busy = [], [], []
    for _ in range(times + 1):
        terminal = Terminal([*TUI, "open", str(RECORDING)], (80, 24))
        frames.append(terminal.read_for(30, until=b"parameters") or float("nan"))
        used = psutil.Process(terminal.process.pid).cpu_times()
        busy.append(used.user + used.system)
        terminal.close()
        began = time.perf_counter()
        subprocess.run([*TUI, "--help"], check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - began)
    for name, found in (("first frame", frames[1:]), ("first frame, CPU time", busy[1:]), ("--help", helps[1:])):
        print(f"{name:<34}{min(found):>8.3f} s, median {statistics.median(found):.3f} s")


def slow_links(presses: int) -> None:
    """How long a key takes until what it opens is on the terminal."""
    screens = (("2", b"largest now"), ("3", b"all at once"), ("4", b"if changed"), ("1", b"allocated"))
    for bytes_per_s, truecolor in ((10_000, False), (10_000, True), (5_000, False), (5_000, True)):
        command = [*ANIMATED, "--hz", "4" if bytes_per_s < 10_000 else "10"]
        terminal = Terminal(command, (80, 24), bytes_per_s, truecolor)
        terminal.read_for(8)
        took = []
        for i in range(presses):
            key, expected = screens[i % len(screens)]
            terminal.press(key)
            took.append(terminal.read_for(15, until=expected) or float("inf"))
            terminal.read_for(0.7)
        terminal.close()
        colours = "16 million colours" if truecolor else "256 colours"
        name = f"key to effect, {bytes_per_s // 1000} kB/s, {colours}"
        print(f"{name:<42}{statistics.median(took):>6.2f} s, p95 {p95(took):.2f} s")


def jitter(seconds: float, hz: int = 10) -> None:
    """How late ticks are, by their own schedule, while an engine trains the tiny profile as fast as it can."""
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "ticks.json"
        os.environ["XDG_RUNTIME_DIR"] = folder
        program = [sys.executable, "-m", "tests.benchmarks.ticks", str(noted)]
        terminal = Terminal([*program, "--profile", "tiny", "--device", "cpu", "--hz", str(hz)], (120, 40))
        if terminal.read_for(120, until=b"tok/s") is None or terminal.read_for(120, until=b"backward") is None:
            print("tick jitter: the engine did not come up")
        began = time.monotonic()
        terminal.read_for(seconds)
        ended = time.monotonic()
        for key in "qx":
            terminal.press(key)
            terminal.read_for(1)
        terminal.process.wait(60)
        terminal.close()
        times = [t for t in json.loads(noted.read_text()) if began <= t <= ended]
    off = [(t - times[0]) - round((t - times[0]) * hz) / hz for t in times]
    late = [1e3 * (one - min(off)) for one in off]
    text = f"median {statistics.median(late):.1f} ms, p95 {p95(late):.1f} ms, at most {max(late):.1f} ms"
    print(f"{'tick jitter beside an engine':<34}{text}; {len(times)} of {round(seconds * hz)} ticks")


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))]


def memray(seconds: float) -> None:
    """memray's live view of a small script, where it is installed."""
    program = shutil.which("memray")
    if program is None:
        print("memray live: not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(MEMRAY_SCRIPT)
        _beside("memray live, 80x24", [program, "run", "--live", "-q", str(script)], seconds)


def nvitop(seconds: float) -> None:
    """nvitop, where it is installed and there is a GPU: without one it shows nothing."""
    program = shutil.which("nvitop")
    if program is None:
        print("nvitop: not installed")
    elif subprocess.run([program, "-1"], capture_output=True, check=False).returncode:
        print("nvitop: needs a GPU")
    else:
        _beside("nvitop, 80x24", [program, "-m", "full"], seconds)


def _beside(name: str, command: list[str], seconds: float) -> None:
    terminal = Terminal(command, (80, 24))
    terminal.read_for(5)
    _told(name, terminal, seconds)
    terminal.close()


def main() -> None:
    """All of it, or some."""
    for name in ("NO_COLOR", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="of every steady measurement")
    parser.add_argument("--presses", type=int, default=40)
    parts: dict[str, Callable[[], None]] = {
        "starts": lambda: starts(7), "steady": lambda: steady(flags.seconds),
        "slow": lambda: slow_links(flags.presses), "jitter": lambda: jitter(flags.seconds),
        "memray": lambda: memray(flags.seconds), "nvitop": lambda: nvitop(flags.seconds),
    }  # fmt: skip
    parser.add_argument("--only", choices=[*parts])
    flags = parser.parse_args()
    # What a killed app had started may be writing bytecode for another moment.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # Nothing of this user's is read or written: settings, the tour, bytecode.
        for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "PYTHONPYCACHEPREFIX"):
            os.environ[name] = f"{folder}/{name}"
        (Path(folder) / "XDG_STATE_HOME" / "gpumem-tui").mkdir(parents=True)
        (Path(folder) / "XDG_STATE_HOME" / "gpumem-tui" / "tour-seen").touch()
        for name, part in parts.items():
            if flags.only in (None, name):
                part()


if __name__ == "__main__":
    main()
