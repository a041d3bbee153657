"""Know before you run: the very same loop over fake tensors, on a modelled GPU.

    plan        the run's, on the device `cpu:0`; of equal layers only a few (`shortened`)
    recorder    FakeCuda: what operators return, and what CUDA's kernels take beside it
    build, train, Tracer, hooks, Ledger: those of a measured run
    requests      what they ask the allocator for; with all layers again (`extrapolate`)
    allocator   CachingAllocator: blocks, slack and segments (`play`)

Nothing is computed and nothing is read but the model's configuration.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from ..allocator_settings import AllocatorSettings, of_environment
from ..config import RunConfig, UserError, one_line
from ..events import Phase, Recompute, StepTrace
from ..model_shell import numel
from ..module_names import strip_wrappers
from ..techniques.compile import NOT_PREDICTED
from ..tracing import owners
from ..tracing.tracer import Tracer
from ..train import StepResult, loaded, train
from ..workload import Plan, prepare
from . import bitsandbytes_cuda
from .alloc_requests import AllocRequests
from .allocator_replay import Replay, Replayed
from .caching_allocator import CachingAllocator, OutOfMemoryError
from .cuda_kernels import kernels, take_workspaces
from .cuda_patches import cuda_paths, sets_in_order
from .fake_cuda import DEVICE, FakeCuda
from .fake_streams import fake_streams
from .gpus import Gpu
from .layer_extrapolation import extrapolate
from .layer_passes import UnlikeError
from .layers import HEADS, Layers, shortened
from .libraries_loading import libraries_loading
from .micro_batch_extrapolation import TRACED, UnlikeMicroBatchesError, extrapolate_micro_batches
from .op_cache import op_cache
from .outcome import Verdict
from .pinned_memory import taken_bytes

STEPS = 2
"""Enough for the steady state: the second step runs beside what the first has left."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The results of a run over fake tensors, in the form of a measured run's.

    Attributes:
        traces: Loading, then each step.
        steps: Results of the steps; losses and times mean nothing.
        recomputes: Of all steps.
        parameters: In the model.
        trainable_parameters: Those with gradients.
        workspace_bytes: Of cuBLAS.
        managed_bytes: Of paged optimizers.
        pinned_bytes: Of the host's memory, the most.
        reserved_bytes: The most the allocator held.
        expandable_bytes: The most it held with expandable segments; None: not asked.
        possible_peak_bytes: The most that was allocated if kernels took all they may and all stayed that may: never
            below the peak.
        verdict: Whether it goes through in the GPU's memory.
        max_positions: Tokens in a row that the model was made for; 0: not said.
        traced_layers: How many layers were traced to know of all; None: each.
        shapes: Of the trained parameters that were traced, in order: how they are cut follows from that.
    """

    traces: list[StepTrace]
    steps: list[StepResult]
    recomputes: list[Recompute]
    parameters: int
    trainable_parameters: int
    workspace_bytes: int
    managed_bytes: int
    pinned_bytes: int
    reserved_bytes: int
    expandable_bytes: int | None
    possible_peak_bytes: int
    verdict: Verdict
    max_positions: int
    traced_layers: int | None
    shapes: tuple[tuple[int, ...], ...] = ()


def rehearse(
    config: RunConfig, gpu: Gpu, steps: int = STEPS, every_layer: bool = False, ranks: int = 1, rank: int = 0
) -> Rehearsal:
    """Load and train over fake tensors.

    Args:
        config: The run.
        gpu: Where it would run.
        steps: How many to go through, from 2 on.
        every_layer: Trace each layer, also those that are alike, and each micro-batch. The
            result is the same and takes longer.
        ranks: Processes of the job.
        rank: Number of the one that is rehearsed.

    Raises:
        UserError: What a run would refuse as well, or an operator of the model
            has no shape without data.
    """
    config = dataclasses.replace(config, steps=config.new_tokens if config.generates else steps)
    plan = planned(config)
    # DeepSpeed's buckets are cut regardless of layers, so that no layer does what another does.
    alike = not every_layer and not config.text("parallel").startswith("zero")
    shorter = _shorter(plan) if alike else iter(())
    short, layers = next(shorter, (plan, None))
    few = not every_layer and _repeats_micro_batches(plan)
    gc.freeze()  # so that collecting afterwards looks at what was made here only
    try:
        with _job(plan, ranks, rank):
            while True:
                try:
                    return _Rehearsing(config, gpu, short, layers, few).run()
                except UnlikeMicroBatchesError:
                    few = False
                except UnlikeError:
                    short, layers = next(shorter, (plan, None))
    except UserError:
        raise
    except Exception as error:  # whatever a library says to this model and these settings
        raise UserError(f"{config.model}: this cannot be predicted: {one_line(error)}") from error
    finally:
        gc.collect()
        gc.unfreeze()


def _shorter(plan: Plan) -> Iterator[tuple[Plan, Layers | None]]:
    """Plans of fewer layers, each to be tried where the one before has turned out to have other layers."""
    before = None
    for head in HEADS:
        short, layers = shortened(plan, head)
        if layers is not None and layers != before:
            yield short, layers
        before = layers


def _repeats_micro_batches(plan: Plan) -> bool:
    """True if the micro-batches of a step may be told from `TRACED` of them.

    Not where rows have several lengths; nor beside other ranks, to whom the last micro-batch sends the gradients.
    """
    recipe, config = plan.recipe, plan.config
    return recipe.accumulation > TRACED and recipe.packing == "off" and config["parallel"] == "none"


def _job(plan: Plan, ranks: int, rank: int) -> AbstractContextManager[None]:
    """A rank of a job, if the run is one; a rank alone needs nothing of what that loads."""
    if plan.config["parallel"] == "none":
        return nullcontext()
    from .fake_ranks import fake_rank

    return fake_rank(plan.recipe.parallelism, ranks, rank)


def planned(config: RunConfig) -> Plan:
    """A run of shapes only, whose every kernel is known."""
    with libraries_loading():
        plan = prepare(config, DEVICE, shapes_only=True)
    if config.flag("compile"):
        raise UserError(NOT_PREDICTED)
    if bitsandbytes_cuda.PACKAGE in plan.recipe.libraries:
        bitsandbytes_cuda.refuse_unknown()
    return plan


def told_tokens(count: int) -> list[int]:
    """The numbers of the tokens that are gone through: between them the cache grows by as much with each."""
    return sorted(
        {1, 2, *(max(1, count * part // 4) for part in range(1, 4)), max(1, count - 1), count} & {*range(1, count + 1)}
    )


class Counts(NamedTuple):
    """Elements of a model's parameters and of those that are trained; bytes in managed and in pinned memory."""

    parameters: int
    trainable_parameters: int
    managed_bytes: int
    pinned_bytes: int


def rehearsed(
    requests: AllocRequests,
    steps: Sequence[StepResult],
    counts: Counts,
    workspace_bytes: int,
    gpu: Gpu,
    layers: Layers | None = None,
    max_positions: int = 0,
    settings: AllocatorSettings | None = None,
    micro_batches: int = 0,
) -> Rehearsal:
    """Give every block its place on a GPU.

    Args:
        requests: What the loop asked for, by loading and by the steps.
        steps: Their results.
        counts: Of the model.
        workspace_bytes: Taken by libraries before the loop began.
        gpu: Where it would run.
        layers: Which of them stand for others; None: each is there.
        max_positions: Tokens in a row that the model was made for; 0: not said.
        settings: Of the allocator; None: those of the environment.
        micro_batches: Of each step, of which `TRACED` are there; 0: all are.

    Raises:
        UnlikeError: The layers do not all do the same.
        UnlikeMicroBatchesError: The micro-batches do not.
    """
    if layers is not None:
        requests = extrapolate(requests, layers)
    if micro_batches:
        requests = extrapolate_micro_batches(requests, micro_batches)
    settings = of_environment() if settings is None else settings
    replay = Replay(requests, allocator := _allocator(settings))
    played = replay.replayed()
    replay.repeat()
    reserved = allocator.peak_reserved_bytes
    inside = (played.allocated[start : start + len(trace.events)] for start, trace in requests.traces)
    peak = max(int(allocated.max()) for allocated in inside if len(allocated))
    kept = (int(played.allocated[each.begin : each.end + 1].max()) + each.bytes for each in requests.kept)
    possible = max(peak, played.possible_peak_bytes, *kept)
    verdict, expandable = _verdict(requests, settings, peak, possible, reserved, gpu)
    return Rehearsal(
        traces=played.traces,
        steps=[_counted(step, n, requests, played) for n, step in enumerate(steps, 1)],
        recomputes=played.recomputes,
        parameters=counts.parameters,
        trainable_parameters=counts.trainable_parameters,
        workspace_bytes=workspace_bytes,
        managed_bytes=counts.managed_bytes,
        pinned_bytes=counts.pinned_bytes,
        reserved_bytes=reserved,
        expandable_bytes=expandable,
        possible_peak_bytes=possible,
        verdict=verdict,
        max_positions=max_positions,
        traced_layers=layers.traced if layers else None,
    )


class _Rehearsing:
    """One pass of the loop.

    Args:
        config: With the number of steps to go through.
        gpu: Where it would run.
        plan: What to build; of fewer layers, if some stand for others.
        layers: Which those are.
        few: Whether `TRACED` micro-batches of a step stand for all.
    """

    def __init__(self, config: RunConfig, gpu: Gpu, plan: Plan, layers: Layers | None, few: bool) -> None:
        self.config, self.gpu, self.layers = config, gpu, layers
        self.micro_batches = plan.recipe.accumulation if few else 0
        recipe = dataclasses.replace(plan.recipe, accumulation=TRACED) if few else plan.recipe
        rows = {name: op_cache().mode.from_tensor(values) for name, values in plan.batches.rows.items()}
        self.plan = dataclasses.replace(plan, recipe=recipe, batches=dataclasses.replace(plan.batches, rows=rows))
        self.traces: list[StepTrace] = []
        self.steps: list[StepResult] = []
        self.recomputes: list[Recompute] = []
        self.shapes: tuple[tuple[int, ...], ...] = ()

    def run(self) -> Rehearsal:
        """Rehearse, and give every block its place."""
        recorder = FakeCuda(kernels(self.gpu))
        # No step is described: another mode on top would change what the model of CUDA sees of references.
        tracer = Tracer(recorder, self._keep, self.recomputes.append, float("inf"), described=-1)
        recorder.ragged = self.plan.recipe.packing != "off"
        recorder.pinned.times = lambda: self._times(tracer.module_now)
        try:
            with (
                cuda_paths(self.gpu, recorder, self.plan.recipe.libraries, self._times),
                fake_streams(recorder),
                self._rank_paths(recorder, tracer),
                sets_in_order(self.plan.shell),
                op_cache().mode,
                recorder,
            ):
                take_workspaces(self.gpu, recorder)
                workspace = recorder.allocated_bytes()
                counts = self._train(tracer, recorder)
        finally:
            tracer.release()
        done = rehearsed(
            AllocRequests(
                recorder.rows(),
                list(zip(recorder.starts, self.traces, strict=True)),
                self.recomputes,
                recorder.inputs,
                recorder.kept,
            ),
            self.steps,
            counts,
            workspace,
            self.gpu,
            self.layers,
            self.plan.positions,
            self.plan.recipe.allocator,
            self.micro_batches,
        )
        return dataclasses.replace(done, shapes=self.shapes)

    def _rank_paths(self, recorder: FakeCuda, tracer: Tracer) -> AbstractContextManager[None]:
        if self.config["parallel"] == "none":
            return nullcontext()
        from .fake_ranks import rank_paths

        return rank_paths(self.plan.recipe, recorder, self.layers.repeated if self.layers else iter, tracer.own_held)

    def _keep(self, trace: StepTrace) -> None:
        if not trace.is_open:
            self.traces.append(trace)

    def _times(self, name: str) -> int:
        """Number of parameters that the named one stands for."""
        return self.layers.times(strip_wrappers(name)) if self.layers else 1

    def _train(self, tracer: Tracer, recorder: FakeCuda) -> Counts:
        """Go through the loop."""

        def on_step(result: StepResult) -> None:
            if self.micro_batches:
                result = _of_all(result, self.micro_batches)
            self.steps.append(result)
            if result.step == self.config.steps:  # while the loop still holds what it holds between steps
                recorder.close()
                tracer.settle()

        with warnings.catch_warnings(), ExitStack() as undo:
            warnings.simplefilter("ignore")  # what kernels say about speed and fake tensors concerns nobody here
            workload = undo.enter_context(loaded(self.plan, tracer))
            if self.config.generates:
                from ..generate import generate

                told = told_tokens(self.config.steps)
                generate(self.config, workload, tracer, lambda _: True, lambda: None, on_step, told)
            else:
                train(self.config, workload, tracer, lambda _: True, lambda: None, on_step)
        names = {parameter: name for name, parameter in workload.model.named_parameters()}
        sizes = [(self._times(name), numel(p), p.requires_grad) for p, name in names.items()]
        self.shapes = tuple(tuple(p.shape) for p in names if p.requires_grad)
        managed = sum(
            self._times(names.get(parameter, "")) * owners.paged_bytes([state])
            for parameter, state in workload.optimizer.state.items()
        )
        more = sum(  # no module was at work when the optimizer made them: of each that stands for several there is one
            (self._times(names.get(parameter, "")) - 1) * sum(map(taken_bytes, copies))
            for parameter, copies in getattr(workload.optimizer, "pinned_copies", {}).items()
        )
        return Counts(
            sum(times * size for times, size, _ in sizes),
            sum(times * size for times, size, trained in sizes if trained),
            managed,
            recorder.pinned.peak_bytes + more,
        )


def _of_all(step: StepResult, micro_batches: int) -> StepResult:
    """The result of a step of so many micro-batches, from one of `TRACED`."""
    tokens = None if step.tokens is None else step.tokens // TRACED * micro_batches
    return dataclasses.replace(step, rows=step.rows // TRACED * micro_batches, tokens=tokens)


def _counted(step: StepResult, nth: int, requests: AllocRequests, played: Replayed) -> StepResult:
    """A step's result with the allocator's counters."""
    start, trace = requests.traces[nth]
    stepped = [span.end for span in trace.phases if span.phase is Phase.OPTIMIZER]
    row = start + max(stepped, default=len(trace.events)) - 1
    counted = played.traces[nth].counted
    assert counted is not None and counted.peak_bytes is not None
    return dataclasses.replace(
        step,
        allocated_bytes=int(played.allocated[row]),
        peak_bytes=counted.peak_bytes,
        reserved_bytes=int(played.reserved[row]),
    )


def _reserved_bytes(requests: AllocRequests, allocator: CachingAllocator) -> int:
    """The most that an allocator holds while it serves requests, and one more step."""
    Replay(requests, allocator).repeat()
    return allocator.peak_reserved_bytes


def _verdict(
    requests: AllocRequests,
    settings: AllocatorSettings,
    peak_bytes: int,
    possible_peak_bytes: int,
    reserved_bytes: int,
    gpu: Gpu,
) -> tuple[Verdict, int | None]:
    """True if requests go through in a GPU's memory, and what expandable segments would hold if gaps matter to that."""
    margin = gpu.safe_bound_bytes(possible_peak_bytes) - peak_bytes
    capacity = gpu.available_bytes - margin
    if peak_bytes > capacity:
        return Verdict.TOO_LARGE, None
    if reserved_bytes <= capacity:
        return Verdict.FITS, None
    if settings.expandable:
        return Verdict.FRAGMENTED, reserved_bytes
    expandable = _reserved_bytes(requests, _allocator(AllocatorSettings(True, settings.divisions)))
    try:
        _reserved_bytes(requests, _allocator(settings, capacity))
    except OutOfMemoryError:
        return Verdict.FRAGMENTED, expandable
    return Verdict.TIGHT, expandable


def _allocator(settings: AllocatorSettings, capacity_bytes: int | None = None) -> CachingAllocator:
    return CachingAllocator(capacity_bytes, settings.expandable, settings.divisions)
