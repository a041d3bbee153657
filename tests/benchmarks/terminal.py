"""What the app costs a terminal: `python -m tests.benchmarks.terminal`.

Runs it under a pty and measures the CPU time of its process, the bytes it writes, how long
the first frame and `--help` take, and how long a key takes to have an effect on a slow link.
The source is made beforehand (a run of 24 layers, a new reading and a partial trace ten times
a second), so that what is measured is the app and no engine. memray's live view is measured
the same way if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import select
import signal
import statistics
import struct
import subprocess
import sys
import termios
import time
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
    """

    def __init__(self, command: list[str], size: tuple[int, int], bytes_per_s: float | None = None) -> None:
        self.began = time.monotonic()
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLORFGBG": "15;0"}
        if bytes_per_s is not None:  # sshd does not pass it on
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
            cpu, rate = terminal.cost(seconds)
            print(f"{f'live, {size[0]}x{size[1]}, {hz} Hz':<34}{cpu:>8.2f}{rate:>10,.0f}")
            if hz == 10:
                terminal.press(" ")
                terminal.read_for(1)
                cpu, rate = terminal.cost(seconds)
                print(f"{f'live, {size[0]}x{size[1]}, view paused':<34}{cpu:>8.2f}{rate:>10,.0f}")
            terminal.close()
    terminal = Terminal([*TUI, "open", str(RECORDING), "--hz", "10"], (80, 24))
    terminal.read_for(5)
    cpu, rate = terminal.cost(seconds)
    print(f"{'a recording, nothing changes':<34}{cpu:>8.2f}{rate:>10,.0f}")
    terminal.close()


def starts(times: int) -> None:
    """Time to the first frame, and of `--help`: the best and the median."""
    frames, helps, busy = [], [], []
    for _ in range(times):
        terminal = Terminal([*TUI, "open", str(RECORDING)], (80, 24))
        frames.append(terminal.read_for(10, until=b"parameters") or float("nan"))
        used = psutil.Process(terminal.process.pid).cpu_times()
        busy.append(used.user + used.system)
        terminal.close()
        began = time.perf_counter()
        subprocess.run([*TUI, "--help"], check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - began)
    for name, found in (("first frame", frames), ("first frame, CPU time", busy), ("--help", helps)):
        print(f"{name:<34}{min(found):>8.3f} s, median {statistics.median(found):.3f} s")


def slow_links(presses: int) -> None:
    """How long a key takes until what it opens is on the terminal."""
    screens = (("2", b"largest now"), ("3", b"all at once"), ("4", b"if changed"), ("1", b"allocated"))
    for bytes_per_s in (10_000, 5_000):
        terminal = Terminal([*ANIMATED, "--hz", "4" if bytes_per_s < 10_000 else "10"], (80, 24), bytes_per_s)
        terminal.read_for(8)
        took = []
        for i in range(presses):
            key, expected = screens[i % len(screens)]
            terminal.press(key)
            took.append(terminal.read_for(15, until=expected) or float("inf"))
            terminal.read_for(0.7)
        terminal.close()
        took.sort()
        p95 = took[min(len(took) - 1, round(0.95 * len(took)))]
        median = statistics.median(took)
        print(f"{f'key to effect, {bytes_per_s // 1000} kB/s':<34}{median:>8.2f} s, p95 {p95:.2f} s")


def memray(seconds: float) -> None:
    """memray's live view of a small script, where it is installed."""
    script = Path("/tmp") / "gpumem-memray-script.py"
    script.write_text(MEMRAY_SCRIPT)
    terminal = Terminal([sys.executable, "-m", "memray", "run", "--live", "-q", str(script)], (80, 24))
    terminal.read_for(5)
    if terminal.process.poll() is None:
        cpu, rate = terminal.cost(seconds)
        print(f"{'memray live, 80x24':<34}{cpu:>8.2f}{rate:>10,.0f}")
        terminal.close()
    else:
        print("memray live: not installed")


def main() -> None:
    """All of it, or some."""
    os.environ.pop("NO_COLOR", None)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="of every steady measurement")
    parser.add_argument("--presses", type=int, default=40)
    parser.add_argument("--only", choices=("steady", "starts", "slow", "memray"))
    flags = parser.parse_args()
    parts = {
        "starts": lambda: starts(7), "steady": lambda: steady(flags.seconds),
        "slow": lambda: slow_links(flags.presses), "memray": lambda: memray(flags.seconds),
    }  # fmt: skip
    for name, part in parts.items():
        if flags.only in (None, name):
            part()


if __name__ == "__main__":
    main()
