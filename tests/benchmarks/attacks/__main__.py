"""Run the attacks and print what was tried and what failed; exit code 1 if anything did."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpumem_tui.engine import engine_registry
from gpumem_tui.engine.engine_registry import EngineDir
from gpumem_tui.engine.feed import End, Start, ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.remote import Remote, peek

from ...conftest import small_run
from ...terminal import until
from . import Tally, fresh, lines, recordings, sockets, toml, victim

SHOWN = 20


@contextlib.contextmanager
def engine() -> Iterator[tuple[EngineDir, Tally]]:
    """An engine's process that trains; it has to train on when this is over."""
    proof = Tally(1)
    remote = JobSource(Launcher())
    remote.start(small_run(steps=0))
    until(lambda: remote.engine_dir is not None and steps_of(remote.engine_dir) >= 2)
    engine_dir = remote.engine_dir
    assert engine_dir is not None
    yield engine_dir, proof
    if remote.role is ViewerRole.GONE:
        ended = remote.events(0)[-1]
        proof.failed.append(f"{ended.text} {getattr(ended, 'detail', '')[-1000:]}")
    remote.close()
    last = Remote(engine_dir, take=True)
    try:
        last.attach()
        last.command(Start(small_run(steps=0, batch_size=1)))
        until(lambda: last.run is not None and last.run.config == small_run(steps=0, batch_size=1))
        until(lambda: steps_of(engine_dir) >= 2)
        last.command(End())
        until(lambda: not engine_dir.alive())
    except Exception as error:
        proof.failed.append(f"the engine does not train on: {error!r}")
    last.close()


@contextlib.contextmanager
def watched_script() -> Iterator[tuple[EngineDir, Tally]]:
    """A script's process that is watched; it has to end as it would alone when this is over."""
    proof = Tally(1)
    script = subprocess.Popen(
        [sys.executable, "-m", victim.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(lambda: any(steps_of(found) >= 2 for found in engine_registry.engines()))
    yield engine_registry.find(victim.NAME).members[0], proof
    out, err = script.communicate(timeout=60)
    how_to_attach = f"gpumem-tui: watching Sequential; to see it: gpumem-tui attach {victim.NAME}\n"
    if script.returncode or err.decode() != how_to_attach or not out.endswith(b" steps\n"):
        proof.failed.append(f"the script ended with {script.returncode}: {out[-300:]!r} {err[-300:]!r}")


def steps_of(engine_dir: EngineDir) -> int:
    """How far it is."""
    status = peek(engine_dir)
    return status.step if status is not None else 0


def on_socket(
    target: Callable[[], contextlib.AbstractContextManager[tuple[EngineDir, Tally]]],
) -> Callable[[Path, int, int], Tally]:
    """The attack on whatever serves a socket."""

    def attack(_folder: Path, seed: int, count: int) -> Tally:
        with target() as (engine_dir, proof):
            tally = sockets.attack(engine_dir, seed, count)
        return Tally(tally.tried, tally.failed + proof.failed)

    return attack


ATTACKS: dict[str, tuple[str, int, Callable[[Path, int, int], Tally]]] = {
    "sockets": ("messages to an engine", 16_000, on_socket(engine)),
    "watched": ("messages to a watched script", 8_000, on_socket(watched_script)),
    "toml": ("files in TOML", 8_000, toml.attack),
    "recordings": ("recordings", 6_000, recordings.attack),
    "lines": ("command lines", 300, lines.attack),
}


def main() -> int:
    """Attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=", ".join(ATTACKS))
    parser.add_argument("--share", type=float, default=1.0, help="of what is tried by default")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="g-"))
    os.environ |= {"XDG_RUNTIME_DIR": str(fresh(home / "run")), "HF_HUB_OFFLINE": "1"}
    failed = 0
    for name in flags.attacks or ATTACKS:
        what, count, attack = ATTACKS[name]
        began_s = time.monotonic()
        tally = attack(fresh(home / name), flags.seed, max(1, int(count * flags.share)))
        failed += len(tally.failed)
        print(
            f"{what}: {tally.tried} tried, {len(tally.failed)} failed, {time.monotonic() - began_s:.0f} s", flush=True
        )
        for line in tally.failed[:SHOWN]:
            print(f"  {line[:1000]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
