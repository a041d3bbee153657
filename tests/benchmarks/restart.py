"""How long a toggle takes: from the key to the first step of the new run, against a bare script's load to first step.

    python -m tests.benchmarks.restart [--profile P] [--batch-size N] [--set KEY=VALUE] [--rounds N]

An engine trains and is told to go on with a setting changed, and back. The bare script, a process of
its own with nothing attached, loads the same model the same way and does one step; what it takes counts
from when its libraries are imported and the device is open. A script is started anew for a change, so that
is what the goal compares with. Harder is the second comparison, in turn with the engine so that both see the
same machine: the script's process does it again and again, with every kernel loaded, and frees the model of before
as the engine does; what that takes is told apart. The key comes at any moment of a step. The engine's time has
more in it than the script's: it leaves the step under way, counts what leaked, and traces. On a GPU the default
profile is the 1.3B model, on a CPU `tiny`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from gpumem_tui.engine import device as devices
from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.feed import Start, Stop
from gpumem_tui.engine.run_events import (
    Loaded,
    OutOfMemory,
    Refused,
    RunEnded,
    RunEvent,
    RunFailed,
    RunStarted,
    Saved,
    StepEnded,
)
from gpumem_tui.engine.session import Session
from gpumem_tui.engine.workload import build, prepare
from gpumem_tui.profiles import run_fields

GOAL = 1.2
SETTLED = 3
"""Steps a run does before it is left: what a first step makes is there by then."""
WARM_UP = 2
"""Rounds that do not count: one of each of the two configurations."""
LOOKS_EVERY_S = 0.02
"""As an app would at the most: each look takes the interpreter from the engine for a moment. Events have their time."""
SCRIPTS = 3
"""Scripts that are started anew."""


def bare(connection: Connection) -> None:
    """The script: for every configuration that comes, load, do a step, free everything; answer the seconds of each."""
    device = devices.select("auto")
    prepare(techniques.configure(run_fields("tiny"), {}), device)  # imports the libraries
    torch.zeros(1, device=device)
    while (plain := connection.recv()) is not None:
        config = techniques.parse_config(plain, "the benchmark")
        began = time.perf_counter()
        workload = build(prepare(config, device))
        loaded = time.perf_counter()
        loss = workload.model(**workload.batches.next()).loss
        loss.backward()
        workload.optimizer.step()
        loss.item()
        workload.optimizer.zero_grad()
        stepped = time.perf_counter()
        del workload, loss
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        connection.send((loaded - began, stepped - loaded, time.perf_counter() - stepped))


class Toggled:
    """An engine that is told to change."""

    def __init__(self) -> None:
        self.session = Session("auto")
        self.next_index = 0

    def restart(self, before: RunConfig, after: RunConfig) -> tuple[float, float, float]:
        """Seconds from the command to the end of the old run, from there to the new one loaded, of its first step."""
        settled = self._start(before, SETTLED)[StepEnded]
        assert isinstance(settled, StepEnded)
        time.sleep(random.uniform(0, settled.seconds or 0.0))
        self.session.tell(Saved(text="the key", path=""))  # an event that no run tells of itself, for its time
        told = self._start(after, 1)
        seconds = told[StepEnded].time_s - told[Saved].time_s
        self.session.command(Stop())
        assert self.session.wait(600)
        loading = told[Loaded].time_s - told[RunEnded].time_s
        stepping = told[StepEnded].time_s - told[Loaded].time_s
        return seconds - loading - stepping, loading, stepping

    def _start(self, config: RunConfig, steps: int) -> dict[type[RunEvent], RunEvent]:
        """Start, and wait for a step; returns the last event of every kind."""
        self.session.command(Start(config))
        told: dict[type[RunEvent], RunEvent] = {}
        while True:
            for event in self.session.events(self.next_index):
                self.next_index = event.index + 1
                told[type(event)] = event
                assert not isinstance(event, RunFailed | Refused | OutOfMemory), event.text
                loaded_here = Loaded in told and told[Loaded].index > told[RunStarted].index
                if loaded_here and isinstance(event, StepEnded) and event.step >= steps:
                    return told
            time.sleep(LOOKS_EVERY_S)


def started() -> tuple[Any, Connection]:
    """A script that waits for configurations, and the way to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    script = context.Process(target=bare, args=(there,), daemon=True)
    script.start()
    return script, here


class Measured(NamedTuple):
    """Seconds of each round.

    Attributes:
        anew: Of a script that is started for it: to load, and of the first step.
        again: Of one whose process does it again and again: to load, of the first step, and to free the model.
        toggled: Of the engine: to leave and free, to load, and of the first step.
        device: Where, in words.
    """

    anew: list[tuple[float, float]]
    again: list[tuple[float, float, float]]
    toggled: list[tuple[float, float, float]]
    device: str

    @property
    def over_anew(self) -> float:
        """The times that the engine takes as long as a script started anew."""
        return statistics.median(map(sum, self.toggled)) / statistics.median(map(sum, self.anew))

    @property
    def over_again(self) -> float:
        """The times that the engine takes as long as the same process again, of neighbours."""
        return statistics.median(sum(b) / sum(a) for a, b in zip(self.again, self.toggled, strict=True))

    @property
    def over_unfreed(self) -> float:
        """Likewise, if the process takes no time to free the model of before."""
        return statistics.median(sum(b) / sum(a[:2]) for a, b in zip(self.again, self.toggled, strict=True))


def measured(profile: str, batch_size: int, setting: str, rounds: int) -> Measured:
    """Toggle a setting on and off, in turn with the scripts."""
    base = techniques.configure(run_fields(profile), {"batch_size": batch_size})
    other = base.with_(techniques.parse(dict([setting.split("=", 1)]), "--set"))
    anew = []
    for _ in range(SCRIPTS):
        script, here = started()
        here.send(other.as_dict())
        anew.append(here.recv()[:2])
        if len(anew) < SCRIPTS:
            here.send(None)
            script.join(30)
    engine = Toggled()
    again: list[tuple[float, float, float]] = []
    toggled: list[tuple[float, float, float]] = []
    try:
        for i in range(rounds + WARM_UP):
            before, after = (base, other) if i % 2 else (other, base)
            here.send(after.as_dict())
            again.append(here.recv())
            toggled.append(engine.restart(before, after))
        where = engine.session.environment()
    finally:
        here.send(None)
        engine.session.close()
        script.join(30)
    return Measured(anew, again[WARM_UP:], toggled[WARM_UP:], where.device_name if where else "?")


def main() -> int:
    """Print all three and the ratios; 0 if the first is within the goal."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--profile", default="polyglot-ko-1.3b" if torch.cuda.is_available() else "tiny")
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--set", default="checkpointing=layers", help="the setting that is toggled: key=value")
    flags.add_argument("--rounds", type=int, default=10)
    chosen = flags.parse_args()
    found = measured(chosen.profile, chosen.batch_size, chosen.set, chosen.rounds)
    print(f"{chosen.profile} at batch {chosen.batch_size}, {chosen.set} on and off, {chosen.rounds} rounds in turn")
    print(f"on {found.device}, torch {torch.__version__}; seconds, median (least to most):")
    rows = [
        ("bare script, started anew", [sum(a) for a in found.anew]),
        ("bare script, again and again", [sum(a) for a in found.again]),
        ("  load", [load for load, _, _ in found.again]),
        ("  first step", [step for _, step, _ in found.again]),
        ("  the model freed", [freed for _, _, freed in found.again]),
        ("engine, from the key", [sum(b) for b in found.toggled]),
        ("  the old run left and freed", [ending for ending, _, _ in found.toggled]),
        ("  load", [load for _, load, _ in found.toggled]),
        ("  first step", [step for _, _, step in found.toggled]),
    ]
    for name, seconds in rows:
        print(f"{name:<34}{statistics.median(seconds):>8.3f}  ({min(seconds):.3f} to {max(seconds):.3f})")
    told = f"engine over script started anew: {found.over_anew:.3f}, goal {GOAL}"
    print(f"{told}; over it again and again: {found.over_again:.3f}, its freeing not counted {found.over_unfreed:.3f}")
    return int(found.over_anew > GOAL)


if __name__ == "__main__":
    sys.exit(main())
