"""Somebody else's code says the same: PyTorch's own hooks, profiler and allocator against the ledger."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import Phase, StepTrace
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.tracing.block_layout import BlockLayout
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.engine.tracing.tracer import Tracer
from gpumem_tui.engine.train import train
from gpumem_tui.engine.workload import Workload, build, prepare

from .allocator_state import entries
from .benchmarks import exactness
from .conftest import Engine, small_run, smaller

DATA = Path(__file__).parent / "data"


class Loop:
    """The engine's loop in this thread, so that somebody else can look on."""

    def __init__(self, config: RunConfig) -> None:
        self.traces: list[StepTrace] = []
        self.config, self.tracker = config, OpTracker()
        self.tracer = Tracer(self.tracker, self._seen, lambda _: None, 1e9)
        self.workload: Workload = build(prepare(config, torch.device("cpu")))
        self.tracer.adopt(self.workload.model, self.workload.optimizer)

    def _seen(self, trace: StepTrace) -> None:
        self.traces.append(trace)

    def train(self, around: Any = None) -> Ledger:
        """Two steps; the ledger of the second."""
        with self.tracker, around or nullcontext(), self.tracer.attached():
            train(self.config, self.workload, self.tracer, lambda _: True, lambda: None, lambda _: None)
        self.tracer.release()
        return Ledger(self.traces[-1])


# --- every event ---------------------------------------------------------------------


def test_every_byte_of_the_matrix_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A line a configuration: nothing unknown, nothing off the allocator's own counters, every recompute seen."""
    assert exactness.main(["--quick"]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert len(lines) == 4
    assert all(line.split()[-5:-3] == ["0", "0"] for line in lines)


# --- saved activations ---------------------------------------------------------------


SAVED_BY_OTHERS = {Category.PARAMETERS, Category.BUFFERS, Category.INPUTS}
MADE_TO_BE_SAVED = {Category.ACTIVATIONS, Category.LOGITS_LOSS, Category.KV_CACHE}


@pytest.mark.parametrize("settings", [{}, {"dtype": "mixed"}, {"lora": "on"}, {"checkpointing": "layers"}], ids=str)
def test_activations_are_what_autograd_saves(settings: dict[str, Any]) -> None:
    """Every tensor that autograd saves in forward is an activation, logits or cache; every activation is saved."""
    loop = Loop(small_run(**settings))
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if loop.tracer.step_now == 2 and loop.tracer.phase_now is Phase.FORWARD:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    ledger = loop.train(saved_tensors_hooks(pack, lambda tensor: tensor))
    end_of_forward = next(span.end for span in ledger.trace.phases if span.phase is Phase.FORWARD) - 1
    alive = {int(row["address"]): row for row in ledger.alive(end_of_forward)}
    kept = {a: size for a, size in saved.items() if a in alive and alive[a]["category"] not in SAVED_BY_OTHERS}
    assert kept, "nothing was saved"
    assert {Category(alive[a]["category"]) for a in kept} <= MADE_TO_BE_SAVED
    activations = {a: int(row["bytes"]) for a, row in alive.items() if row["category"] == Category.ACTIVATIONS}
    # A checkpoint keeps its inputs itself, where autograd's hooks do not look.
    by_checkpoint = set() if not settings.get("checkpointing") else set(activations) - set(saved)
    assert {a: saved.get(a) for a in activations if a not in by_checkpoint} == {
        a: size for a, size in activations.items() if a not in by_checkpoint
    }


# --- the profiler --------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled() -> tuple[Ledger, Any]:
    """Two steps of the loop under `torch.profiler`."""
    loop = Loop(small_run(smaller()))
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(
        activities=activities, profile_memory=True, record_shapes=True, with_stack=True
    )  # fmt: skip
    return loop.train(profiler), profiler


def test_the_profilers_categories_agree(profiled: tuple[Ledger, Any]) -> None:
    """Parameters, gradients and optimizer state by `torch.profiler`'s own analysis of data flow."""
    ledger, profiler = profiled
    profile = profiler._memory_profile()
    sizes: Counter[str] = Counter()
    seen = set()
    for _, action, (key, version), size in profile.timeline:
        category = profile._categories.get(key, version)
        if category is not None and (key.storage, key.id) not in seen and "DESTROY" not in str(action):
            seen.add((key.storage, key.id))
            sizes[category.name] += size
    after = ledger.after(Phase.OPTIMIZER)
    assert after is not None
    assert sizes["PARAMETER"] == after[Category.PARAMETERS]
    assert sizes["OPTIMIZER_STATE"] == after[Category.OPTIMIZER_STATE]
    assert sizes["GRADIENT"] == 2 * after[Category.GRADIENTS], "two steps, each with its own"


SCALAR_BYTES = 8
KERNELS_WITH_BUFFERS = {
    "aten::native_layer_norm_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}
"""Who else allocates: they free in the same operator what no tracker of operators can see."""


def test_the_profilers_allocations_are_ours(profiled: tuple[Ledger, Any]) -> None:
    """The same curve as the CPU allocator's own events, but for scalars and buffers inside three kernels."""
    ledger, profiler = profiled
    events = ledger.trace.events
    ours = events["bytes"].tolist()
    first_ns, last_ns = int(events["time_us"][0] - 50) * 1000, int(events["time_us"][-1] + 50) * 1000
    theirs = [(size, where) for ns, size, where in allocations(profiler) if first_ns <= ns <= last_ns]
    assert not Counter(ours) - Counter(size for size, _ in theirs), "the profiler has seen all that we have"
    beyond = Counter(size for size, _ in theirs) - Counter(ours)
    buffers = {size for size, where in theirs if size < 0 and beyond[size] and where in KERNELS_WITH_BUFFERS}
    assert {size for size in beyond if abs(size) > SCALAR_BYTES} == buffers | {-size for size in buffers}
    highest, highest_of_theirs = max(np.cumsum(ours)), max(np.cumsum([size for size, _ in theirs]))
    assert 0 <= highest_of_theirs - highest <= 4 * SCALAR_BYTES


def allocations(profiler: Any) -> list[tuple[int, int, str]]:
    """Time, bytes (negative: freed) and enclosing operator of every allocation that the profiler saw."""
    from torch._C._profiler import _EventType

    found = []

    def walk(event: Any, where: str) -> None:
        if event.typed[0] == _EventType.Allocation:
            found.append((event.start_time_ns, event.typed[1].alloc_size, where))
        for child in event.children:
            walk(child, event.name)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, "")
    return sorted(found)


# --- the caching allocator -----------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2-h200", "qwen2.5-qlora-expandable-h200"])
def test_the_layout_follows_the_allocator_to_the_byte(name: str) -> None:
    """Whole traces of real runs on a GPU, from the process's start: the allocator's own peak and reserved bytes."""
    recorded = np.load(DATA / f"{name}.npz")
    actions = recorded["actions"][recorded["action"]].tolist()
    seen = BlockLayout([]).follow(
        entries(*zip(actions, recorded["address"].tolist(), recorded["size"].tolist(), strict=True))
    )
    by_the_allocator = recorded["peaks"]
    assert np.cumsum(seen.rows["bytes"] + seen.rows["slack"]).max() == by_the_allocator[:, 0].max()
    assert seen.segments["bytes"].sum() == by_the_allocator[-1, 1]


# --- descriptions --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "mixed"}, {"lora": "on", "quantization": "nf4"}, {"checkpointing": "layers"}, {"accumulation": 2}],
    ids=str,
)
def test_every_tensor_at_the_peak_has_a_shape(engine: Engine, settings: dict[str, Any]) -> None:
    """One step is watched; the steps after it are described by it."""
    engine.run(small_run(**settings, steps=3))
    for trace in engine.traces[-2:]:
        ledger = Ledger(trace)
        for event in (ledger.peak.event, len(trace.events) // 3):
            blocks = ledger.largest(event, 10_000)
            assert len(blocks) > 10
            for block in blocks:
                assert block.dtype, block
                size = getattr(torch, block.dtype).itemsize
                assert block.bytes >= int(np.prod(block.shape)) * size, block


def test_autocasts_copies_of_weights_say_so(engine: Engine) -> None:
    engine.run(small_run(dtype="mixed", steps=3))
    ledger = Ledger(engine.traces[-1])
    end_of_forward = next(span.end for span in ledger.trace.phases if span.phase is Phase.FORWARD) - 1
    copies = {
        block.operator: block
        for block in ledger.largest(end_of_forward, 10_000)
        if block.operator.startswith("aten._to_copy of ")
    }
    copy = copies["aten._to_copy of gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    assert (copy.dtype, copy.category) == ("bfloat16", Category.ACTIVATIONS)
    assert copy.module == "gpt_neox.layers.0.mlp.dense_h_to_4h"
