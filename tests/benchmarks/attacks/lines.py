"""Command lines: commands and flags as they are, and values that none of them takes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpumem_tui.tui.cli import COMMANDS

from . import LONGEST_LINE, Tally, fresh

WITHIN_S = 120.0
AT_A_TIME = 2
SMALL = ["--profile", "tiny", "--batch-size", "2", "--seq-len", "16", "--steps", "1", "--device", "cpu"]
FLAGS = (
    "--profile", "--model", "--preset", "--set", "--batch-size", "--seq-len", "--rows", "--steps", "--learning-rate",
    "--seed", "--device", "--data", "--json", "--save", "--predict", "--gpu", "--table", "--format", "--hz", "--theme",
    "--ascii", "--no-mouse", "--once", "--jsonl", "--linger", "--take", "--help", "--frobnicate", "-x", "--",
)  # fmt: skip
VALUES = (
    "", " ", "-1", "0", "1e999", "inf", "nan", "9" * 5000, "x" * 300, "x" * 70_000, "\x1b[2J", "a\nb", "é\u202e",
    "\udcff", "/", "/dev/null", "/dev/full", "/proc/self/mem", "~", ".", "lora=on", "lora.r=-3", "lora.targets=zzz",
    "=", "a=b=c", "keys.save=q", "theme=blue", "cuda:99", "tpu", "tiny", "qlora", "A100", "24GB", "json",
    "recording.gpumem", "%n%s",
)  # fmt: skip
WORDS = (*(name for name, _, _ in COMMANDS if name != "exec"), "config", "jump")
SUBCOMMANDS = {"config": ("show", "path", "set", "unset"), "completion": ("bash", "zsh", "fish")}
TRAINS = ("run", "sweep", "estimate", "advise", "--once")


def line(rnd: random.Random) -> list[str]:
    """A command line; what trains has little to train."""
    word = rnd.choice((*WORDS, *WORDS, "--once"))
    words = [word, *([rnd.choice(SUBCOMMANDS[word])] if word in SUBCOMMANDS else [])]
    words += SMALL if word in TRAINS and rnd.random() < 0.9 else []
    for _ in range(rnd.choice((1, 1, 2, 3))):
        words.append(rnd.choice(FLAGS if rnd.random() < 0.7 else VALUES))
        if rnd.random() < 0.8:
            words.append(rnd.choice(VALUES))
    # All of the reference's nine rows, or all there is to advise, are for who has the time.
    return [*words, "--batch-size", "-1"] if word in ("sweep", "advise", "estimate") and rnd.random() < 0.8 else words


def problem(words: list[str], folder: Path) -> str | None:
    """Run one in a home of its own; what was wrong with how it ended, or None."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "GPUMEM", "SSH_"))
    } | {"HOME": str(fresh(folder / "home")), "TMPDIR": str(fresh(folder / "tmp")), "PYTHONWARNINGS": "default",
         "XDG_RUNTIME_DIR": str(fresh(folder / "run")), "HF_HUB_OFFLINE": "1", "EDITOR": "true"}  # fmt: skip
    try:
        done = subprocess.run(
            [os.fsencode(word) for word in (sys.executable, "-m", "gpumem_tui.tui", *words)],
            cwd=fresh(folder / "here"), env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=WITHIN_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not over after {WITHIN_S:.0f} s"
    except OSError as error:  # more than the kernel takes is no command line
        return None if "too long" in str(error) else repr(error)
    errors = done.stderr.decode(errors="replace")
    if done.returncode not in (0, 2, 3) or "Traceback" in errors + done.stdout.decode(errors="replace"):
        return f"exit code {done.returncode}: {errors[-500:]}"
    last = errors.splitlines()[-1:]
    if done.returncode == 2 and not (last and last[0].startswith("gpumem-tui: ") and len(last[0]) <= LONGEST_LINE + 20):
        return f"exit code 2 and no line: {errors[-300:]!r}"
    if engines := [p.name for p in (folder / "run").rglob("*") if p.name not in ("gpumem-tui", ".lock")]:
        return f"left an engine: {engines}"
    left = [p.name for p in (folder / "here").rglob("*") if p.name.startswith(".")]
    return f"left {left}" if left else None


def attack(folder: Path, seed: int, count: int) -> Tally:
    """Run so many command lines; each does what it says, or is refused in one line."""
    rnd = random.Random(seed)
    lines = [line(rnd) for _ in range(count)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        problems = pool.map(lambda numbered: problem(numbered[1], folder / str(numbered[0])), enumerate(lines))
        failed = [f"{words!r:.300}: {wrong}" for words, wrong in zip(lines, problems, strict=True) if wrong is not None]
    return Tally(count, failed)
