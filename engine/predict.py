"""Know before you run: the very same loop over fake tensors, on a modelled GPU.

    plan        the run's, on the device `cpu:0`
    recorder    FakeCuda: what operators return, and what CUDA's kernels take beside it
    allocator   CachingAllocator: blocks, slack and segments
    build, train, Tracer, hooks, Ledger: those of a measured run

Nothing is computed and nothing is read but the model's configuration.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import techniques
from .config import RunConfig, UserError, Value
from .device import installed_packages
from .events import Environment, Kind, Milestone, Phase, Recompute, StepTrace
from .prediction.caching_allocator import CachingAllocator
from .prediction.cuda_kernels import kernels, take_workspaces
from .prediction.fake_cuda import cuda_paths
from .prediction.gpus import Gpu
from .prediction.outcome import Prediction, safe_bound_bytes
from .prediction.search import largest
from .prediction.steady_state import repeat
from .prediction.tracker import DEVICE, FakeCuda
from .report import Report
from .sources import owners
from .sources.tracer import Tracer
from .train import StepResult, train
from .workload import Plan, build, prepare

STEPS = 2
"""Enough for the steady state: the second step runs beside what the first has left."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a run over fake tensors leaves behind: the same as a measured one.

    Attributes:
        traces: Loading, then each step.
        steps: Results of the steps; losses and times mean nothing.
        recomputes: Of all steps.
        parameters: In the model.
        trainable_parameters: Those with gradients.
        workspace_bytes: Of cuBLAS.
        managed_bytes: Of paged optimizers.
        reserved_bytes: The most the allocator held.
        max_positions: Tokens in a row that the model was made for; 0: not said.
    """

    traces: list[StepTrace]
    steps: list[StepResult]
    recomputes: list[Recompute]
    parameters: int
    trainable_parameters: int
    workspace_bytes: int
    managed_bytes: int
    reserved_bytes: int
    max_positions: int


def gpu_here() -> Gpu | None:
    """The GPU of this machine, if it has one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    threads = found.max_threads_per_multi_processor
    return Gpu(found.name, found.total_memory, (found.major, found.minor), found.multi_processor_count, threads)


def environment(gpu: Gpu) -> Environment:
    """The machine a prediction speaks of: this one's libraries on that GPU."""
    capability = ".".join(map(str, gpu.capability))
    return Environment("cuda:0", gpu.name, gpu.memory_bytes, capability, None, installed_packages())


def predict(config: RunConfig, gpu: Gpu, steps: int = STEPS) -> Prediction:
    """Predict a run's memory.

    Args:
        config: The run. Its device and its data do not matter.
        gpu: Where it would run.
        steps: How many to go through, from 2 on.

    Raises:
        UserError: The configuration cannot run there, or cannot be predicted.
    """
    began = time.perf_counter()
    techniques.check(config)
    techniques.check_available(config, environment(gpu))
    done = rehearse(config, gpu, steps)
    document = _document(config, gpu, done)
    peak = document["peak"]
    return Prediction(
        config=config,
        gpu=gpu.name,
        loaded_bytes=document["loaded"]["allocated_bytes"],
        after_step_bytes=document["after_first_step"]["allocated_bytes"],
        peak_bytes=peak["allocated_bytes"],
        by_category=peak["by_category"],
        peak_phase=peak["phase"],
        reserved_bytes=done.reserved_bytes,
        managed_bytes=done.managed_bytes,
        safe_bound_bytes=safe_bound_bytes(peak["allocated_bytes"]),
        available_bytes=gpu.memory_bytes - gpu.context_bytes,
        max_positions=done.max_positions,
        seconds=time.perf_counter() - began,
        document=document,
    )


def largest_that_fit(prediction: Prediction, gpu: Gpu) -> dict[str, int]:
    """The largest batch size and the largest sequence length that fit, everything else being equal.

    Returns:
        `max_batch_size` and `max_sequence_length`; 0: not even the smallest.
    """
    config = prediction.config

    def search(name: str, smallest: int, most: int) -> int:
        def bound_at(value: int) -> int:
            if value == config[name]:
                return prediction.safe_bound_bytes
            return predict(config.with_({name: value}), gpu).safe_bound_bytes

        found = largest(bound_at, config.integer(name), prediction.available_bytes, most)
        return found if found >= smallest else 0

    return {
        "max_batch_size": search("batch_size", 1, 65_536),
        "max_sequence_length": search("seq_len", 2, prediction.max_positions or 1 << 20),
    }


def rehearse(config: RunConfig, gpu: Gpu, steps: int = STEPS) -> Rehearsal:
    """Load and train over fake tensors.

    Raises:
        UserError: What a run would refuse as well, or an operator of the model
            has no shape without data.
    """
    traces: list[StepTrace] = []
    results: list[StepResult] = []
    recomputes: list[Recompute] = []
    config = dataclasses.replace(config, steps=steps)
    gc.freeze()  # so that collecting afterwards looks at what was made here only
    plan = prepare(config, DEVICE, shapes_only=True)
    recorder = FakeCuda(CachingAllocator(expandable=_expandable_segments()), kernels(gpu))
    # No step is described: another mode on top would change what the model of CUDA sees of references.
    tracer = Tracer(
        recorder, lambda t: None if t.partial else traces.append(t), recomputes.append, float("inf"), described=0
    )
    try:
        with cuda_paths(gpu, recorder), FakeTensorMode(allow_non_fake_inputs=True), recorder:
            recorder.workspaces = take_workspaces(gpu, recorder)
            workspace = recorder.allocated_bytes()
            facts = _run(config, plan, tracer, traces, results)
    except UserError:
        raise
    except Exception as error:  # whatever a library says to this model and these settings
        raise UserError(f"{config.model}: this cannot be predicted: {_one_line(error)}") from error
    finally:
        tracer.release()
        gc.collect()
        gc.unfreeze()
    reserved = recorder.allocator.peak_reserved_bytes
    positions = int(getattr(plan.architecture.get_text_config(), "max_position_embeddings", 0) or 0)
    return Rehearsal(traces, results, recomputes, *facts[:2], workspace, facts[2], reserved, positions)


def _run(
    config: RunConfig, plan: Plan, tracer: Tracer, traces: list[StepTrace], results: list[StepResult]
) -> tuple[int, int, int]:
    with tracer.step(0, 1, True, tuple):
        with tracer.phase(Phase.LOAD):
            workload = build(plan)
        tracer.adopt(workload.model, workload.optimizer)
    recorder = tracer.recorder
    assert isinstance(recorder, FakeCuda)

    def on_step(result: StepResult) -> None:
        results.append(result)
        if result.step == config.steps:  # while the loop still holds what it holds between steps
            recorder.close()
            tracer.settle()
            repeat(recorder.allocator, *traces[-2:])

    with tracer.attached(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what kernels say about speed concerns nobody here
        train(config, workload, tracer, lambda _: True, lambda: None, on_step)
    return workload.parameters, workload.trainable_parameters, owners.paged_bytes(workload.optimizer)


def _document(config: RunConfig, gpu: Gpu, done: Rehearsal) -> dict[str, Any]:
    """The document of `run`, from the traces and the milestones that a session would have told."""
    report = Report()
    for trace in done.traces:
        report.add(trace)
    said: list[tuple[Kind, dict[str, Any]]] = [
        (Kind.LOADED, {"parameters": done.parameters, "trainable_parameters": done.trainable_parameters}),
        *((Kind.STEP_ENDED, dataclasses.asdict(step) | {"loss": None, "seconds": None}) for step in done.steps),
        *((Kind.RECOMPUTED, r._asdict() | {"ms": None}) for r in done.recomputes),
        (
            Kind.RUN_ENDED,
            {"managed_bytes": done.managed_bytes, "workspace_bytes": done.workspace_bytes, "leaked_bytes": 0},
        ),
    ]
    milestones = [Milestone(i, 0.0, kind, 1, "", data) for i, (kind, data) in enumerate(said)]
    return report.document(environment(gpu), config, milestones)


def _expandable_segments() -> bool:
    """Whether PyTorch is told to use them, as it would be for the run."""
    told = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in setting.lower().replace(" ", "") for setting in told)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


CALCULATOR: dict[str, dict[str, Value]] = {
    "float32": {"dtype": "float32"},
    "float16/bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "nf4"},
}


def calculator(config: RunConfig, gpu: Gpu) -> list[dict[str, Any]]:
    """The memory calculator's table: bytes by data type of the weights and by what is done with them.

    Weights: what is allocated once they are loaded. Inference: the peak of one
    forward pass without gradients. The others: the peak of training, where
    quantized weights can only be trained beside (QLoRA).
    """
    rows: list[dict[str, Any]] = []
    for name, settings in CALCULATOR.items():
        plain: dict[str, Value] = {"lora": False, "quantization": "none"}
        full = config.with_(plain | settings)
        adapters = full.with_({"lora": True})
        quantized = full["quantization"] != "none"
        loaded, inference = _inference(full, gpu)
        rows.append(
            {
                "dtype": name,
                "weights_bytes": loaded,
                "inference_bytes": inference,
                "training_adam_bytes": None if quantized else predict(full, gpu).peak_bytes,
                "lora_bytes": None if quantized else predict(adapters, gpu).peak_bytes,
                "qlora_bytes": predict(adapters, gpu).peak_bytes if quantized else None,
            }
        )
    return rows


def _inference(config: RunConfig, gpu: Gpu) -> tuple[int, int]:
    """Bytes loaded, and the peak of a forward pass over one batch without gradients."""
    plan = prepare(config, DEVICE, shapes_only=True)
    plan.recipe.transforms.clear()  # what prepares for training
    recorder = FakeCuda(CachingAllocator(), kernels(gpu))
    with cuda_paths(gpu, recorder), FakeTensorMode(allow_non_fake_inputs=True), recorder:
        recorder.workspaces = take_workspaces(gpu, recorder)
        taken = recorder.allocated_bytes()
        model = build(plan).model.eval()
        loaded = recorder.allocated_bytes() - taken
        recorder.reset_peak()
        with torch.no_grad():
            model(input_ids=plan.batches.next()["input_ids"])
        return loaded, recorder.peak_bytes()
