"""The goals of quick answers and of cheap watching, beside what they come to: `python -m tests.benchmarks.goals`.

Where there is a GPU, what it takes; where there is none, how soon answers come. Each row is measured by the
benchmark that it names, which tells more. A table in Markdown.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import answers, cost, restart, watched

SIDE = 96
"""Pixels of ResNet-50's pictures: about 20 ms a step of 64 on an H100, most of it the host's."""


class Row(NamedTuple):
    """One goal, what was measured, and by what."""

    what: str
    goal: str
    measured: str
    by: str


def of_answers() -> Iterator[Row]:
    """How soon answers come, in seconds of the wall."""
    with answers.checked_out(None) as here:
        took = {name: one for name, _, one in answers.measured({"here": here}, 1)}
        named = {name: one for name, _, one in answers.named_by({"here": here}, 1)}
    small, large, known = (took[f"estimate {name}"] for name in ("1.3B", "8B QLoRA", "8B QLoRA, known"))
    first = f"{small.first_s:.1f} / {large.first_s:.1f} s; {known.first_s:.1f} s"
    yield Row("`estimate` 1.3B / 8B QLoRA, first figures, cold; known", "4 / 6 s; 1 s", first, "answers")
    yield Row("`advise` 8B QLoRA, cold", "12 s", f"{took['advise 8B QLoRA'].wall_s:.1f} s", "answers")
    app = [named[name].key_s for name in answers.APP]
    what = "app: the change to try first is named after the first step; known; beside a process on each core"
    yield Row(what, "8 s; at once; 20 s", "{:.1f} s; {:.1f} s; {:.1f} s".format(*app), "answers")


def of_a_gpu(device: torch.device) -> Iterator[Row]:
    """What watching takes of a training, in times of what it takes alone."""
    toggled = restart.measured("polyglot-ko-1.3b", 8, "checkpointing=layers", 12)
    what = "toggle to the end of the first step, 1.3B, against the same loop warm in one process"
    engine_s, loop_s, freed_s = (
        statistics.median(seconds)
        for seconds in (
            [sum(one) for one in toggled.toggled],
            [load + step for load, step, _ in toggled.again],
            [freed for *_, freed in toggled.again],
        )
    )
    told = (
        f"{toggled.over_again:.2f}, its freeing not counted {toggled.over_unfreed:.2f} "
        f"({engine_s:.2f} s; {loop_s:.2f} and {freed_s:.2f} to free)"
    )
    yield Row(what, "1.2", told, "restart")
    alone_s, ratios = watched.measured(watched.images(SIDE, 64, device), 30, 30)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    told = f"{statistics.mean(ratios):.3f} +- {error:.3f}, median {statistics.median(ratios):.3f}"
    what = f"`watch`, ResNet-50, batch 64 of {SIDE}x{SIDE}, {alone_s * 1e3:.0f} ms a step"
    yield Row(what, "1.02", told, "watched")
    bench = cost.Bench("polyglot-ko-1.3b", 8, device, {})
    seconds, _ = cost.measured(bench, 16, ("no inspector", "live default", "every step traced"))
    bare = seconds["no inspector"]
    every, live = (cost.ratios(seconds[mode], bare) for mode in ("every step traced", "live default"))
    told = f"{statistics.median(every):.3f}; as by default {statistics.median(live):.3f}"
    yield Row(f"every step traced, 1.3B batch 8, {statistics.median(bare) * 1e3:.0f} ms a step", "1.10", told, "cost")


def main() -> None:
    """Print the table."""
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_gpu else f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    print(f"{where}, torch {torch.__version__}\n")
    print("| | goal | measured | by |\n|---|---|---|---|")
    for row in of_a_gpu(torch.device("cuda", 0)) if on_gpu else of_answers():
        print(f"| {row.what} | {row.goal} | {row.measured} | `{row.by}` |", flush=True)


if __name__ == "__main__":
    main()
