"""A run in small: what is left of it when the next one has begun, and what is compared.

A summary holds no trace: a few hundred numbers, whatever the run's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..engine import techniques
from ..engine.config import RunConfig, UserError, show
from ..engine.difference import Owned, from_document, owned
from ..engine.events import Category, Milestone, Phase
from ..engine.feed import Source
from ..engine.ledger import Bytes, Ledger
from .run_state import RunState

ROUTINE = ("rows", "steps", "seed")
"""Without influence on memory: in no label."""


class RunSummary(NamedTuple):
    """One run.

    Attributes:
        label: Short; what tells it from the others' defaults: `B8 lora k=layers`.
        origin: `run 2`, or a recording's file name.
        config: What it ran.
        loaded: Composition after loading; None: not known.
        after_step: Composition after the first optimizer step, where the reference experiment measures.
        peak: Composition at the highest peak.
        peak_where: Step and phase of it.
        peak_module: The module or optimizer at work then.
        by_phase: Highest total in each phase, over the steps kept.
        by_layer: Bytes at the peak by layer, the model's own under "".
        by_owner: Bytes at the peak by category and owner.
        saved_by_layer: Activations kept as forward ends (`Ledger.saved_by_layer`), in the step of the peak.
        seconds: Of its last step.
        tokens_per_s: Of its last step.
        steps: That ended.
        highest_bytes: By the allocator's own counter, of untraced steps too; None: not known.
        times: How many runs of this configuration it stands for: named after the first, with the figures of the latest.
        predicted: It has not happened.
        caveat: What to know when it is compared with the run that has.
    """

    label: str
    origin: str
    config: RunConfig
    loaded: Bytes | None
    after_step: Bytes | None
    peak: Bytes
    peak_where: str
    peak_module: str
    by_phase: dict[Phase, int]
    by_layer: dict[str, int]
    by_owner: Owned
    saved_by_layer: dict[str, int] | None
    seconds: float | None
    tokens_per_s: float | None
    steps: int
    highest_bytes: int | None = None
    times: int = 1
    predicted: bool = False
    caveat: str = ""

    @property
    def peak_bytes(self) -> int:
        """Everything at the peak."""
        return sum(self.peak.values())


def label(config: RunConfig) -> str:
    """What a run is called in a narrow column: the batch, then what is not the default."""
    words = [f"B{config.batch_size}"]
    for name, value in techniques.changed(config):
        if name not in (*ROUTINE, "batch_size"):
            words.append(name if value is True else f"{name}={show(value)}")
    return " ".join(words)


def summarize(run: RunState, ledgers: Sequence[Ledger], origin: str = "") -> RunSummary:
    """Fold what is kept of a run.

    Args:
        run: What it told; has a configuration.
        ledgers: Of its complete traces; at least one.
        origin: Where it is from; `run <n>` if empty.
    """
    assert run.config is not None
    highest = max(ledgers, key=lambda ledger: ledger.peak.bytes)
    peak = highest.peak
    by_step = {ledger.trace.step: ledger for ledger in ledgers}
    by_phase: dict[Phase, int] = {}
    for ledger in ledgers:
        for phase, most in ledger.highest_by_phase.items():
            by_phase[phase] = max(by_phase.get(phase, 0), most)
    by_layer = {layer: sum(sizes.values()) for layer, sizes in highest.by_layer(peak.event).items()}
    return RunSummary(
        label=label(run.config),
        origin=origin or f"run {run.number}",
        config=run.config,
        loaded=by_step[0].end if 0 in by_step else None,
        after_step=by_step[1].after(Phase.OPTIMIZER) if 1 in by_step else None,
        peak=peak.by_category,
        peak_where=_where(peak.step, peak.phase.title),
        peak_module=peak.module,
        by_phase=by_phase,
        by_layer=by_layer,
        by_owner=owned(highest, peak.event),
        saved_by_layer=highest.saved_by_layer,
        seconds=run.seconds,
        tokens_per_s=run.tokens_per_s,
        steps=run.step,
        highest_bytes=run.peak_bytes,
    )


def of_source(source: Source, origin: str) -> RunSummary:
    """A recording in small.

    Raises:
        UserError: It holds no complete step.
    """
    ledgers = [Ledger(trace) for trace in source.traces()]
    run = RunState()
    milestones: Sequence[Milestone] = source.milestones(0)
    for milestone in milestones:
        run.fold(milestone)
    run.config = run.config or source.config()
    if not ledgers or run.config is None:
        raise UserError(f"{origin}: it holds no step to compare")
    return summarize(run, ledgers, origin)


def of_prediction(
    document: Mapping[str, Any], config: RunConfig, origin: str, packages: Mapping[str, str]
) -> RunSummary:
    """A run that has happened as it was predicted, in small.

    Args:
        document: Of the prediction.
        config: What was predicted.
        origin: Of the run.
        packages: By which it ran; others are worth a word.
    """
    return _of_memory(document, config, f"{origin}, predicted")._replace(
        steps=len(document["steps"]),
        predicted=True,
        caveat=_other_versions(document["environment"]["packages"], packages),
    )


def of_ended(run: RunState) -> RunSummary | None:
    """A run that nobody here has seen, as the engine left it; None if it went through no step."""
    if run.memory is None or run.config is None:
        return None
    return _of_memory(run.memory, run.config, f"run {run.number}")._replace(
        seconds=run.seconds, tokens_per_s=run.tokens_per_s, steps=run.step, highest_bytes=run.peak_bytes
    )


def _of_memory(document: Mapping[str, Any], config: RunConfig, origin: str) -> RunSummary:
    """What the parts of a document say that `Report.memory` lists."""
    peak, phases = document["peak"], document["highest_by_phase"]
    return RunSummary(
        label=label(config),
        origin=origin,
        config=config,
        loaded=_sizes(document["loaded"]),
        after_step=_sizes(document["after_first_step"]),
        peak=_sizes(peak) or {},
        peak_where=_where(peak["step"], peak["phase"]),
        peak_module=peak["module"],
        by_phase={phase: phases[phase.name.lower()] for phase in Phase if phase.name.lower() in phases},
        by_layer={layer: sum(sizes.values()) for layer, sizes in peak["by_layer"].items()},
        by_owner=from_document(peak),
        saved_by_layer=document.get("saved_by_layer"),  # an older recording of several runs has none
        seconds=None,
        tokens_per_s=None,
        steps=0,
    )


def _other_versions(predicting: Mapping[str, str], running: Mapping[str, str]) -> str:
    """The libraries that a run and its prediction do not have in common: they may allocate otherwise."""
    both = {name: (version.split("+")[0], running[name].split("+")[0])
            for name, version in predicting.items() if name in running}  # fmt: skip
    told = [f"{name} {one} (run: {other})" for name, (one, other) in both.items() if one != other]
    return f"~ predicted with {', '.join(told)}" if told else ""


def _sizes(composition: Mapping[str, Any] | None) -> Bytes | None:
    if composition is None:
        return None
    return {category: composition["by_category"][category.key] for category in Category}


def _where(step: int, phase: str) -> str:
    return f"step {step}, {phase}" if step else "loading"


def table_row(summary: RunSummary) -> list[int | None]:
    """The reference experiment's columns: loaded, gradients, optimizer, after the first step; and the peak it lacks."""
    loaded, after = summary.loaded, summary.after_step
    return [
        sum(loaded.values()) if loaded else None,
        after[Category.GRADIENTS] if after else None,
        after[Category.OPTIMIZER_STATE] if after else None,
        sum(after.values()) if after else None,
        summary.peak_bytes,
    ]


TABLE_HEADS = ("loaded", "gradients", "optimizer", "after step", "peak")
