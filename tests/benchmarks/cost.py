"""What does watching cost? Median step time against the same loop without an inspector.

    python -m tests.benchmarks.cost [--profile P] [--batch-size B ...] [--set KEY=VALUE ...] [--rounds N]
    torchrun --nproc-per-node 2 -m tests.benchmarks.cost --batch-size 8 --set parallel=ddp parallel.ranks=2

All modes run interleaved in one process on one model, so that clocks and heat
are shared; a mode's figure is the median over its rounds, of each the median step,
and its ratio that to the bare loop's right before and after. A second thread reads
the gauge and packs the latest trace ten times a second, as an engine does for the app,
which is a process of its own. Of several
ranks each is watched so, and the first one's times are printed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpumem_tui.engine import device as devices
from gpumem_tui.engine import techniques, wire
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.parallelism.group import join, leave
from gpumem_tui.engine.publisher import TRACE_SHARE
from gpumem_tui.engine.tracing.tracer import Tracer
from gpumem_tui.engine.train import train
from gpumem_tui.engine.workload import Workload, build, prepare
from gpumem_tui.profiles import run_fields

STEPS = 9
WARM_UP = 3
"""Steps of a round that do not count; in the second of them a tracer watches operators, once in a run."""
RANK = int(os.environ.get("RANK", "-1"))
"""Of the job that torchrun has started; -1: none."""


class _Seeing(TorchDispatchMode):
    """The least a dispatch mode can do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Bench:
    """One model, many ways to run its loop."""

    def __init__(self, profile: str, batch_size: int, device: torch.device, chosen: dict[str, str]) -> None:
        self.device = device
        settings = {"batch_size": batch_size, "steps": STEPS, "learning_rate": 0} | chosen
        self.config = techniques.configure(run_fields(profile), techniques.parse(settings, "benchmark"))
        if self.device.type == "cuda":
            from gpumem_tui.engine.tracing.allocator_trace import AllocatorTrace

            self.recorder: Any = AllocatorTrace(self.device)
        else:
            from gpumem_tui.engine.tracing.op_tracker import OpTracker

            self.recorder = OpTracker()
        self.latest: StepTrace | None = None
        self.workload: Workload = build(prepare(self.config, self.device))
        self.outputs: Any = None

    def bare(self, around: Callable[[], Any] = nullcontext) -> list[float]:
        """The loop of `engine.train` with nothing but the training in it."""
        call, optimizer, recipe = self.workload.call, self.workload.optimizer, self.workload.recipe
        parallelism = recipe.parallelism
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            with around():
                parallelism.begin(call, last=True)
                batch = self.workload.batches.next()
                self.outputs = call(**batch)
                loss = self.outputs.loss / recipe.accumulation
                parallelism.backward(call, loss)
                parallelism.step(call, self.workload.scaler, optimizer)
                parallelism.zero_grad(optimizer)
                loss.item()
            seconds.append(time.perf_counter() - began)
        self.outputs = None
        return seconds

    def traced(self, every: bool) -> list[float]:
        """`engine.train` with the tracer, as a session runs it; tracing between steps is counted too."""
        tracer = Tracer(self.recorder, self._publish, lambda _: None, 1.0)
        tracer.adopt(self.workload.model, self.workload.optimizer)
        tracer.reduced_by(self.workload.call)
        marks = [time.perf_counter()]
        began = marks[0]

        def want(_step: int) -> bool:
            return every or tracer.cost_s < TRACE_SHARE * (time.perf_counter() - began)

        recording = self.recorder if self.recorder.always_on else nullcontext()
        with recording, tracer.attached():
            train(self.config, self.workload, tracer, want, lambda: None, lambda _: marks.append(time.perf_counter()))
        tracer.release()
        return [b - a for a, b in itertools.pairwise(marks)]

    def _publish(self, trace: StepTrace) -> None:
        self.latest = trace

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What an engine does beside it: read the gauge, pack the trace for a viewer."""
        done, packed = threading.Event(), None

        def watch() -> None:
            nonlocal packed
            while not done.wait(0.1):
                self.recorder.allocated_bytes()
                if self.latest is not packed:
                    packed = self.latest
                    assert packed is not None
                    msgspec.msgpack.encode(wire.pack_trace(1, 1, packed))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def modes(self) -> dict[str, Callable[[], list[float]]]:
        """Every way to run it."""

        def live(every: bool) -> list[float]:
            with self.watched():
                return self.traced(every)

        def profiled() -> list[float]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True):
                return self.bare()

        def memtracked() -> list[float]:
            from torch.distributed._tools.mem_tracker import MemTracker

            def around() -> Any:
                stack = ExitStack()
                tracker = MemTracker()
                tracker.track_external(self.workload.model, self.workload.optimizer)
                stack.enter_context(tracker)
                return stack

            return self.bare(around)

        found = {
            "no inspector": self.bare,
            "live default": lambda: live(False),
            "every step traced": lambda: live(True),
        }
        if RANK >= 0:
            return found
        found |= {
            "minimal TorchDispatchMode": lambda: self.bare(_Seeing),
            "torch.profiler(profile_memory)": profiled,
        }
        try:
            importlib.import_module("torch.distributed._tools.mem_tracker")
        except ImportError:
            return found
        return found | {"MemTracker": memtracked}


def joined() -> torch.device:
    """The device of this rank, which has joined the job."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    join(device)
    return device


def told(title: str, seconds: dict[str, list[float]], memory: dict[str, int]) -> str:
    """The table of one batch size.

    Args:
        title: Of the table.
        seconds: By mode, the median step of each round.
        memory: The peak by mode.
    """
    bare = seconds["no inspector"]
    where = torch.cuda.get_device_name() if memory else "CPU"
    lines = [f"\n{title}, {where}, torch {torch.__version__}"]
    lines.append(f"{'':<32}{'median ms':>10}{'ratio':>8}{'peak bytes beyond':>20}")
    for name, values in seconds.items():
        if values:
            extra = memory[name] - memory["no inspector"] if memory else 0
            ratio = statistics.median(ratios(values, bare))
            lines.append(f"{name:<32}{statistics.median(values) * 1e3:>10.1f}{ratio:>8.3f}{extra:>20}")
    return "\n".join(lines)


def ratios(values: Sequence[float], bare: Sequence[float]) -> list[float]:
    """By round, a mode's step over the bare loop's before and after it."""
    return [value / statistics.mean(bare[i : i + 2]) for i, value in enumerate(values)]


SLOW = {"torch.profiler(profile_memory)", "MemTracker"}
"""Minutes of post-processing a round: they run once."""


def measured(bench: Bench, rounds: int, only: Container[str] = ()) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The median step of each round, in seconds, and the peak, by mode.

    Args:
        bench: The model.
        rounds: Of all modes, in turn.
        only: These modes; none: all.
    """
    on_gpu = bench.device.type == "cuda"
    modes = {name: run for name, run in bench.modes().items() if not only or name in only}
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    memory: dict[str, int] = {}
    bench.bare()
    for round_number in range(rounds):
        for name, run in modes.items():
            if name in SLOW and round_number:
                continue
            try:
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                seconds[name].append(statistics.median(run()[WARM_UP:]))
                if on_gpu:
                    memory[name] = torch.cuda.max_memory_allocated()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:80]}")
    seconds["no inspector"].append(statistics.median(bench.bare()[WARM_UP:]))
    return seconds, memory


def main() -> int:
    """Print one table a batch size."""
    flags = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    flags.add_argument("--profile", default="polyglot-ko-1.3b" if on_gpu else "tiny")
    flags.add_argument("--batch-size", type=int, nargs="*", default=[8, 32] if on_gpu else [8])
    flags.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    flags.add_argument("--rounds", type=int, default=8)
    chosen = flags.parse_args()
    device = joined() if RANK >= 0 else devices.select("auto")
    for batch_size in chosen.batch_size:
        bench = Bench(chosen.profile, batch_size, device, dict(pair.split("=", 1) for pair in chosen.set))
        seconds, memory = measured(bench, chosen.rounds)
        if RANK <= 0:
            title = " ".join([f"{chosen.profile}, batch {batch_size} x 256", *chosen.set])
            print(told(title, seconds, memory))
        del bench
        if on_gpu:
            torch.cuda.empty_cache()
    if RANK >= 0:
        leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
