"""How long does a large snapshot take to open, and how much memory?

    python -m tests.benchmarks.snapshot [--gib 1.0] [--json]

Writes a snapshot as PyTorch does, of allocations with stacks of forty frames,
until the file has the size asked for; then reads it in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpumem_tui.engine.feed import Work
from gpumem_tui.engine.snapshot import read
from gpumem_tui.engine.snapshot.imported import steps_of

GIB, MIB = 1 << 30, 1 << 20
DEPTH, PLACES = 40, 2000


def written(path: Path, size: int, as_json: bool) -> int:
    """A snapshot of about so many bytes; how many entries it has."""
    frames = [{"filename": f"/lib/torch/nn/modules/part{i}.py", "line": i, "name": "forward"} for i in range(PLACES)]
    per_entry = 5400 if as_json else 335  # bytes, of stacks of DEPTH
    count = size // per_entry
    entries: list[dict[str, Any]] = []
    for i in range(count):
        address, stack = 0x7F0000000000 + (i // 3 % 1000) * 4096, [frames[(i // 3 + k) % PLACES] for k in range(DEPTH)]
        action = ("alloc", "free_requested", "free_completed")[i % 3]
        entries.append({"action": action, "addr": address, "size": 4096, "stream": 0,
                        "time_us": 1_700_000_000_000_000 + i, "compile_context": "N/A", "user_metadata": "",
                        "frames": stack})  # fmt: skip
    whole = {"segments": [], "device_traces": [entries], "allocator_settings": {}}
    with path.open("wb") as file:
        if as_json:
            file.write(json.dumps(whole).encode())
        else:
            pickle.dump(whole, file, protocol=4)
    return count


def most_kib() -> int:
    """The most this process has had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def opened(path: Path) -> None:
    """Read it here, and say what that took."""
    Path("/proc/self/clear_refs").write_text("5")  # what was inherited does not count
    before = most_kib()
    work, began, spent = Work(), time.perf_counter(), time.process_time()
    snapshot = read(path, work)
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    held = most_kib() - before
    entries, size = len(snapshot.devices[0]), path.stat().st_size
    print(
        f"{size / GIB:.2f} GiB, {entries:,} entries kept: read in {seconds:.1f} s ({spent:.1f} s of CPU), "
        f"{held / 1024:.0f} MiB held, {held * 1024 / size:.3f} of the file"
    )
    began = time.process_time()
    steps = steps_of(snapshot, 0)
    most = most_kib() - before
    print(f"{len(steps)} steps in {time.process_time() - began:.1f} s of CPU; {most / 1024:.0f} MiB held at most")


def main() -> int:
    """Write and open."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--gib", type=float, default=1.0)
    flags.add_argument("--json", action="store_true")
    flags.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    chosen = flags.parse_args()
    if chosen.open:
        opened(chosen.open)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot"
        written(path, int(chosen.gib * GIB), chosen.json)
        subprocess.run([sys.executable, "-m", "tests.benchmarks.snapshot", "--open", str(path)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
