"""How soon answers come, side by side with another commit: `python -m tests.benchmarks.answers [COMMIT] [--json FILE]`.

Every command runs in a process of its own with an empty cache, once with this
checkout's code and once with the commit's, one after the other, as often as
`--rounds` says; the least counts. CPU seconds are those of the process and of
the processes it has waited for: a machine that is busy with something else
lengthens the wall's seconds alone. The app is started on a terminal, and what
counts is when it names the best change, in the wall's seconds after the first
step: beside nothing, when all is known, and beside another process on each
core. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from .best_change import Named, busy_cores, named

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "engine": "engine",
    "tui": "tui",
    "profiles": "profiles",
    "watch": "engine/watch/public",
    "predict": "engine/prediction/public",
}
"""Where the packaging finds the packages of gpumem_tui."""

GPU = ["--gpu", "H100 80GB"]
QLORA = ["--profile", "llama-3.1-8b", "--preset", "qlora", *GPU]
COMMANDS = {
    "estimate 1.3B": ["estimate", "--profile", "polyglot-ko-1.3b", *GPU],
    "estimate 8B QLoRA": ["estimate", *QLORA],
    "estimate 8B QLoRA, known": ["estimate", *QLORA],
    "estimate 8B QLoRA, warm": ["estimate", *QLORA],
    "advise 8B QLoRA": ["advise", *QLORA],
    "advise 8B QLoRA, warm": ["advise", *QLORA],
    "check 1.3B": ["check", "--profile", "polyglot-ko-1.3b", "--budget", "80GiB", *GPU],
}
"""One that is known has been asked for before, by the command before it; one that is warm has a server of
`gpumem-tui warm` beside it, whose processor time is not its own, and which older commits have not."""


class Took(NamedTuple):
    """Seconds until the first line and until the end, of processors and of the wall."""

    first_cpu_s: float
    first_s: float
    cpu_s: float
    wall_s: float


@contextmanager
def checked_out(commit: str | None) -> Iterator[Path]:
    """A folder with the packages of a commit's code; None: of this checkout's."""
    with tempfile.TemporaryDirectory() as folder:
        source = ROOT
        if commit is not None:
            source = Path(folder) / "source"
            subprocess.run(["git", "worktree", "add", "-q", "--detach", source, commit], cwd=ROOT, check=True)
        try:
            packages = Path(folder) / "packages"
            (packages / "gpumem_tui").mkdir(parents=True)
            for name, where in FOLDERS.items():
                if (source / where).is_dir():
                    (packages / "gpumem_tui" / name).symlink_to(source / where)
            yield packages
        finally:
            if commit is not None:
                subprocess.run(["git", "worktree", "remove", "--force", source], cwd=ROOT, check=True)


def environment_of(packages: Path, cache: str) -> dict[str, str]:
    """The environment of a command of a side, with nothing of this user's."""
    ours = {"PYTHONPATH": str(packages), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        ours[name] = f"{cache}/{name}"
        Path(ours[name]).mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.environ | ours


@contextmanager
def warm(packages: Path, arguments: list[str], cache: str) -> Iterator[bool]:
    """A server for a command, as long as the block lasts; False: this code has none."""
    command, environment = [sys.executable, "-m", "gpumem_tui.tui"], environment_of(packages, cache)
    started = subprocess.run([*command, "warm", *arguments[1:]], env=environment, capture_output=True, check=False)
    yield started.returncode == 0
    if started.returncode == 0:
        subprocess.run([*command, "stop"], env=environment, stdout=subprocess.DEVNULL, check=True)


def took(packages: Path, arguments: list[str], cache: str) -> Took:
    """Run a command and read its output as it comes."""
    environment = environment_of(packages, cache)
    began = time.perf_counter()
    command = [sys.executable, "-m", "gpumem_tui.tui", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    first_s, first_cpu_s = time.perf_counter() - began, _cpu_s(process.pid)
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    return Took(first_cpu_s, first_s, usage.ru_utime + usage.ru_stime, time.perf_counter() - began)


def _cpu_s(pid: int) -> float:
    """Of a process that runs, and of its children that have been waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measured(sides: dict[str, Path], rounds: int) -> Iterator[tuple[str, str, Took]]:
    """Every command on every side: the least of some rounds, the sides in turn."""
    best: dict[tuple[str, str], Took] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, arguments in COMMANDS.items():
                for side, packages in sides.items():
                    cache = Path(folder) / side / (name.removesuffix(", known"))
                    with (
                        warm(packages, arguments, str(cache)) if name.endswith(", warm") else nullcontext(True) as able
                    ):
                        if able:
                            now = took(packages, arguments, str(cache))
                            best[name, side] = min(best.get((name, side), now), now, key=lambda one: one.cpu_s)
    for (name, side), least in best.items():
        yield name, side, least


APP = {"app": False, "app, known": False, "app, both cores busy": True}
"""Whether other processes keep the cores busy; what is known has been worked out by the row before."""


def named_by(sides: dict[str, Path], rounds: int) -> Iterator[tuple[str, str, Named]]:
    """The app on every side: the soonest of some rounds, the sides in turn."""
    best: dict[tuple[str, str], Named] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for name, busy in APP.items():
                for side, packages in sides.items():
                    own = Path(folder) / side / name.removesuffix(", known")
                    environment = environment_of(packages, str(own))
                    with busy_cores(environment) if busy else nullcontext():
                        now = named(environment, own)
                    best[name, side] = min(best.get((name, side), now), now, key=lambda one: one.best_s)
    for (name, side), soonest in best.items():
        yield name, side, soonest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="to compare with; none: this checkout alone")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", choices=["commands", "app"])
    flags = parser.parse_args()
    rows = []
    with checked_out(None) as here, checked_out(flags.commit) as there:
        sides = {"here": here} | ({flags.commit: there} if flags.commit else {})
        if flags.only != "app":
            print(f"{'CPU s (wall s)':<26}{'code':<12}{'first figures':>18}{'whole':>18}")
            for name, side, one in measured(sides, flags.rounds):
                first, whole = f"{one.first_cpu_s:.1f} ({one.first_s:.1f})", f"{one.cpu_s:.1f} ({one.wall_s:.1f})"
                print(f"{name:<26}{side[:10]:<12}{first:>18}{whole:>18}", flush=True)
                rows.append({"command": name, "code": side, **one._asdict()})
        if flags.only != "commands":
            print(f"{'wall s after a step':<26}{'code':<12}{'its key':>10}{'best change':>13}{'all':>8}")
            for name, side, app in named_by(sides, flags.rounds):
                print(f"{name:<26}{side[:10]:<12}{app.key_s:>10.1f}{app.best_s:>13.1f}{app.all_s:>8.1f}  {app.best}")
                rows.append({"command": name, "code": side, **app._asdict()})
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
