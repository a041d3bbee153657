"""A run as one document: what `run --json` prints, and what runs are compared by in figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self, TypeVar

import msgspec

from .categories import Category
from .difference import owned
from .events import Environment, Phase, StepTrace
from .ledger import Bytes, Ledger
from .run import Run, outweighs
from .run_events import Loaded, OutOfMemory, Recomputed, RunEnded, RunFailed, StepEnded

SCHEMA = "gpumem-run/1"
Figures = TypeVar("Figures", bound=msgspec.Struct)


class Composition(msgspec.Struct, frozen=True):
    """The bytes allocated at an instant, by category.

    Attributes:
        allocated_bytes: Sum over the categories.
        by_category: By the categories' keys; those of 0 bytes are listed too.
    """

    allocated_bytes: int
    by_category: dict[str, int]


class TensorFigures(msgspec.Struct, frozen=True):
    """A block alive at the peak, as `ledger.Block` tells of it."""

    bytes: int
    category: str
    owner: str
    dtype: str
    shape: tuple[int, ...]
    made_in: str
    made_by: str
    operator: str


class PoolFigures(msgspec.Struct, frozen=True):
    """A pool of the caching allocator; what is free in one, no request of another is given.

    Attributes:
        stream: As CUDA numbers it; 0: the default one.
        size_class: `small`: of requests up to 1 MiB; or `large`.
        private: Identity of a pool apart, of a CUDA graph or a `torch.cuda.MemPool`; 0, 0: it is none.
        reserved_bytes: Held from the device.
        allocated_bytes: Handed out, of that; slack included.
        slack_bytes: Handed out beyond what was asked for.
    """

    stream: int
    size_class: str
    private: tuple[int, int]
    reserved_bytes: int
    allocated_bytes: int
    slack_bytes: int


class PeakFigures(Composition, frozen=True):
    """The highest peak of a run.

    Attributes:
        step: In which step it was; 0: while loading.
        phase: What the loop was doing.
        micro_batch: From 0.
        module: Module or optimizer at work.
        by_layer: Bytes by layer, the model's own under "", and category.
        by_owner: Bytes by category and owner; layers that repeat are one owner.
        largest: The largest blocks, largest first.
        pools: Of the caching allocator; empty: it has none, or nobody knows them.
    """

    step: int
    phase: str
    micro_batch: int
    module: str
    by_layer: dict[str, dict[str, int]]
    by_owner: dict[str, dict[str, int]]
    largest: list[TensorFigures]
    pools: list[PoolFigures] = []


class StepFigures(msgspec.Struct, frozen=True):
    """A step; fields as in `StepEnded`."""

    step: int
    seconds: float | None
    loss: float | None
    tokens: int | None
    allocated_bytes: int | None
    peak_bytes: int | None
    reserved_bytes: int | None


class RecomputeFigures(msgspec.Struct, frozen=True):
    """A recompute; fields as in `Recomputed`."""

    step: int
    micro_batch: int
    layers: tuple[str, ...]
    bytes: int
    ms: float | None
    early_stop: bool


class RankFigures(msgspec.Struct, frozen=True):
    """One rank of a job.

    Attributes:
        rank: From 0.
        loaded: After loading.
        peak: At its own highest peak.
        outside_torch_bytes: On its GPU and not torch's: CUDA's context and NCCL's buffers; None: not known.
    """

    rank: int
    loaded: Composition | None
    peak: Composition | None
    outside_torch_bytes: int | None = None


class RunDocument(msgspec.Struct, frozen=True):
    """The whole run. Sizes are whole bytes; what never came to be is None.

    Attributes:
        schema: Name and version of this form.
        environment: Where it ran.
        config: As `RunConfig.as_dict`.
        parameters: Elements of all parameters.
        trainable_parameters: Elements of those that are trained.
        loaded: After loading.
        after_first_step: After the first `optimizer.step()`, where the reference experiment measures.
        peak: The highest of all steps traced.
        highest_by_phase: The most allocated while a phase went on.
        saved_by_layer: Activations kept as forward ends, in the step of the peak.
        steps: Those that ended.
        recomputes: In order.
        managed_bytes: In CUDA managed memory.
        pinned_bytes: Of the host's memory, page-locked: what was offloaded, and cached for it.
        workspace_bytes: Kept by libraries from run to run.
        unknown_bytes_max: The most that no rule could name, at any event.
        mismatch_bytes_max: The most that the categories' sum was off the allocator's counter.
        leaked_bytes: Not given back when the run ended.
        failure: Why it failed, in one line; None: it did not.
        ranks: Of a job of several, each; the document itself is then that of the highest.
    """

    schema: str
    environment: Environment
    config: dict[str, Any]
    parameters: int | None
    trainable_parameters: int | None
    loaded: Composition | None
    after_first_step: Composition | None
    peak: PeakFigures | None
    highest_by_phase: dict[str, int]
    saved_by_layer: dict[str, int] | None
    steps: list[StepFigures]
    recomputes: list[RecomputeFigures]
    managed_bytes: int | None
    pinned_bytes: int | None
    workspace_bytes: int | None
    unknown_bytes_max: int
    mismatch_bytes_max: int
    leaked_bytes: int | None
    failure: str | None
    ranks: list[RankFigures] = []

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        plain: dict[str, Any] = msgspec.to_builtins(self, enc_hook=mapping_as_dict)
        return plain


class Report:
    """Folds a run's traces as they come.

    Pass `add` as the session's `on_trace`; of the traces only the one with the highest peak is kept.
    """

    def __init__(self) -> None:
        self._loaded: Composition | None = None
        self._after_first_step: Composition | None = None
        self._highest: Ledger | None = None
        self._by_phase: dict[Phase, Bytes] = {}
        self._unknown_bytes_max = self._mismatch_bytes_max = 0

    @classmethod
    def of(cls, traces: Iterable[StepTrace]) -> Self:
        """The fold of these traces."""
        made = cls()
        for trace in traces:
            made.add(trace)
        return made

    def add(self, trace: StepTrace) -> None:
        """Fold one trace; those of a step under way, or that an error ended, say nothing final."""
        if trace.is_complete:
            self.fold(Ledger(trace))

    def fold(self, ledger: Ledger) -> None:
        """Add a complete step that is folded already."""
        trace = ledger.trace
        self._unknown_bytes_max = max(self._unknown_bytes_max, int(ledger.curve[Category.UNKNOWN].max()))
        self._mismatch_bytes_max = max(self._mismatch_bytes_max, ledger.mismatch_bytes)
        if trace.step == 0:
            self._loaded = composition(ledger.end)
        after_step = ledger.after(Phase.OPTIMIZER)
        if trace.step == 1 and after_step is not None:
            self._after_first_step = composition(after_step)
        for phase, sizes in ledger.fullest_by_phase.items():
            if phase not in self._by_phase or sum(sizes.values()) > sum(self._by_phase[phase].values()):
                self._by_phase[phase] = sizes
        highest = self._highest
        if highest is None or outweighs((ledger.peak.bytes, trace), (highest.peak.bytes, highest.trace)):
            self._highest = ledger

    def by_phase(self) -> dict[str, dict[str, int]]:
        """Composition at the highest moment of each phase over all steps, by the phases' and categories' keys."""
        return {
            phase.name.lower(): {category.key: size for category, size in sizes.items()}
            for phase, sizes in self._by_phase.items()
        }

    def document(self, run: Run) -> RunDocument:
        """The document of the run that the traces were of."""
        events = run.events()
        loaded = next((event for event in events if isinstance(event, Loaded)), None)
        ended = next((event for event in events if isinstance(event, RunEnded)), None)
        return RunDocument(
            schema=SCHEMA,
            environment=run.environment,
            config=run.config.as_dict(),
            parameters=loaded.parameters if loaded else None,
            trainable_parameters=loaded.trainable_parameters if loaded else None,
            loaded=self._loaded,
            after_first_step=self._after_first_step,
            peak=None if self._highest is None else peak_of(self._highest),
            highest_by_phase={phase.name.lower(): sum(sizes.values()) for phase, sizes in self._by_phase.items()},
            saved_by_layer=None if self._highest is None else self._highest.saved_by_layer,
            steps=[_figures(StepFigures, event) for event in events if isinstance(event, StepEnded)],
            recomputes=[_figures(RecomputeFigures, event) for event in events if isinstance(event, Recomputed)],
            managed_bytes=ended.managed_bytes if ended else None,
            pinned_bytes=ended.pinned_bytes if ended else None,
            workspace_bytes=ended.workspace_bytes if ended else None,
            unknown_bytes_max=self._unknown_bytes_max,
            mismatch_bytes_max=self._mismatch_bytes_max,
            leaked_bytes=ended.leaked_bytes if ended else None,
            failure=next((event.text for event in events if isinstance(event, RunFailed | OutOfMemory)), None),
        )


def report(run: Run) -> RunDocument:
    """The document of a run, from the traces that are kept of it."""
    return Report.of(run.traces()).document(run)


def of_job(by_rank: Mapping[int, RunDocument], outside_torch_bytes: Mapping[int, int]) -> RunDocument:
    """The document of a job: that of the rank with the highest peak, with a line for each.

    Args:
        by_rank: Documents of its ranks.
        outside_torch_bytes: By rank, as far as they are known.
    """
    ranks = [
        RankFigures(
            rank, document.loaded, document.peak and _composition_of(document.peak), outside_torch_bytes.get(rank)
        )
        for rank, document in sorted(by_rank.items())
    ]
    highest = max(by_rank, key=lambda rank: (_height(by_rank[rank]), -rank))
    return msgspec.structs.replace(by_rank[highest], ranks=ranks)


def _height(document: RunDocument) -> int:
    return document.peak.allocated_bytes if document.peak else 0


def _composition_of(peak: PeakFigures) -> Composition:
    return Composition(peak.allocated_bytes, peak.by_category)


def peak_of(ledger: Ledger) -> PeakFigures:
    """A step's peak: what held how much at it, by category, layer and owner, and the largest blocks."""
    peak = ledger.peak
    by_layer = ledger.by_layer(peak.event)
    held = composition(peak.by_category)
    return PeakFigures(
        allocated_bytes=held.allocated_bytes,
        by_category=held.by_category,
        step=peak.step,
        phase=peak.phase.title,
        micro_batch=peak.micro_batch,
        module=peak.module,
        by_layer={name: {c.key: n for c, n in sizes.items()} for name, sizes in by_layer.items()},
        by_owner={c.key: kinds for c, kinds in owned(ledger, peak.event).items()},
        largest=[
            TensorFigures(
                bytes=block.bytes,
                category=block.category.key,
                owner=block.name,
                dtype=block.dtype,
                shape=tuple(block.shape),
                made_in=block.phase.title,
                made_by=block.module,
                operator=block.operator,
            )
            for block in ledger.largest(peak.event)
        ],
        pools=[PoolFigures(*pool, *sizes) for pool, *sizes in ledger.pools_at_peak],
    )


def composition(sizes: Bytes) -> Composition:
    """A composition with its sum."""
    return Composition(sum(sizes.values()), {category.key: size for category, size in sizes.items()})


def _figures(kind: type[Figures], event: msgspec.Struct) -> Figures:
    """The fields of an event that a document tells."""
    return kind(**{name: getattr(event, name) for name in kind.__struct_fields__})


def mapping_as_dict(value: Any) -> Any:
    """A read-only mapping as a dict, for msgspec."""
    if isinstance(value, MappingProxyType):
        return dict(value)
    raise NotImplementedError(type(value).__name__)
