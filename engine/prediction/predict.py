"""A run over fake tensors made into a prediction: figures, and a Run as any other."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from .. import techniques
from ..config import RunConfig
from ..device import installed_packages
from ..events import Environment, Recompute
from ..report import Report
from ..run import Run, RunId, RunKind
from ..run_events import Loaded, Note, Recomputed, RunEnded, RunEvent, RunStarted, StepEnded, placed
from ..techniques.parallel import ranks
from .gpus import Gpu
from .job import alike
from .nccl import nccl_bytes
from .outcome import Prediction
from .rehearsal import STEPS, Rehearsal, rehearse

MODELLED = dict.fromkeys(("flash-attn", "liger-kernel", "deepspeed", "torchao"), "modelled")
"""Packages of which no code is run: what they allocate is known without them."""


def environment(gpu: Gpu) -> Environment:
    """The machine a prediction speaks of: this one's libraries on that GPU."""
    capability = ".".join(map(str, gpu.capability))
    return Environment("cuda:0", gpu.name, gpu.memory_bytes, capability, None, installed_packages())


def predict(config: RunConfig, gpu: Gpu, steps: int = STEPS, rank: int | None = None) -> Prediction:
    """Predict a run's memory.

    Args:
        config: The run. Its device and its data do not matter.
        gpu: Where it would run.
        steps: How many to go through, from 2 on.
        rank: Of a job of several; None: one of those that hold most.

    Raises:
        UserError: The configuration cannot run there, or cannot be predicted.
    """
    began = time.perf_counter()
    if config.memory_limit_bytes:
        gpu = gpu.limited(config.memory_limit_bytes)
    here = environment(gpu)
    techniques.check(config, dataclasses.replace(here, packages={**here.packages, **MODELLED}))
    count = ranks(config, gpu.count)
    gpu = gpu.beside(nccl_bytes(config, count))
    done = rehearse(config, gpu, steps, ranks=count, rank=rank or 0)
    groups = alike(config, count, done.shapes)
    if rank is None and 0 not in groups[0]:
        rank = groups[0][0]
        done = rehearse(config, gpu, steps, ranks=count, rank=rank)
    return came_to(config, gpu, done, began, rank=rank or 0, groups=groups)


def came_to(
    config: RunConfig,
    gpu: Gpu,
    done: Rehearsal,
    began_s: float,
    notes: Sequence[str] = (),
    rank: int = 0,
    groups: tuple[tuple[int, ...], ...] = ((0,),),
) -> Prediction:
    """The prediction that a rehearsal comes to.

    Args:
        config: Of the run.
        gpu: Where it would run.
        done: The rehearsal.
        began_s: When predicting began, by `time.perf_counter`.
        notes: What the prediction took for granted, a line each.
        rank: Of a job of several.
        groups: Ranks of the job that hold the same.
    """
    run = _run(config, gpu, done, notes, rank)
    folded = Report.of(done.traces)
    document = folded.document(run)
    loaded, after, peak = document.loaded, document.after_first_step, document.peak
    assert loaded is not None
    assert peak is not None
    return Prediction(
        config=config,
        gpu=gpu.name,
        loaded_bytes=loaded.allocated_bytes,
        after_step_bytes=after.allocated_bytes if after is not None else loaded.allocated_bytes,
        peak_bytes=peak.allocated_bytes,
        by_category=peak.by_category,
        by_phase=folded.by_phase(),
        peak_phase=peak.phase,
        reserved_bytes=done.reserved_bytes,
        expandable_bytes=done.expandable_bytes,
        verdict=done.verdict,
        managed_bytes=done.managed_bytes,
        pinned_bytes=done.pinned_bytes,
        unsure_bytes=done.possible_peak_bytes - peak.allocated_bytes,
        safe_bound_bytes=gpu.safe_bound_bytes(done.possible_peak_bytes),
        available_bytes=gpu.available_bytes,
        max_positions=done.max_positions,
        notes=tuple(notes),
        seconds=time.perf_counter() - began_s,
        whole_run=run,
        alike=groups,
        outside_torch_bytes=gpu.context_bytes,
    )


def _run(config: RunConfig, gpu: Gpu, done: Rehearsal, notes: Sequence[str], rank: int) -> Run:
    """The run, with what a session would have told of it; losses and times are not known."""
    where = dataclasses.replace(environment(gpu), device=f"cuda:{rank}")
    run = Run(RunId(gpu.name, 1, rank, where.device), config, where, RunKind.PREDICTED)
    for index, event in enumerate(_events(done, notes)):
        run.tell(placed(event, index, 0.0, 1))
    run.keep(done.traces)
    return run


def _events(done: Rehearsal, notes: Sequence[str]) -> list[RunEvent]:
    loaded = done.traces[0].counted
    told: list[RunEvent] = [
        RunStarted(text="predicted"),
        *(Note(text=note) for note in notes),
        Loaded(
            text=f"{done.parameters:,} parameters",
            parameters=done.parameters,
            trainable_parameters=done.trainable_parameters,
            allocated_bytes=loaded.end_bytes if loaded else None,
        ),
    ]
    for step in done.steps:
        told += [_recomputed(recompute) for recompute in done.recomputes if recompute.step == step.step]
        told.append(
            StepEnded(
                text=f"step {step.step}",
                step=step.step,
                tokens=step.tokens,
                allocated_bytes=step.allocated_bytes,
                peak_bytes=step.peak_bytes,
                reserved_bytes=step.reserved_bytes,
                traced=True,
            )
        )
    told.append(
        RunEnded(
            text=f"{len(done.steps)} steps predicted",
            reason="predicted",
            steps=len(done.steps),
            leaked_bytes=0,
            workspace_bytes=done.workspace_bytes,
            managed_bytes=done.managed_bytes,
            pinned_bytes=done.pinned_bytes,
        )
    )
    return told


def _recomputed(recompute: Recompute) -> Recomputed:
    text = f"step {recompute.step}: {recompute.layers[0]}, {recompute.bytes / 2**20:.1f} MiB"
    return Recomputed(text=text, **(recompute._asdict() | {"ms": None}))
