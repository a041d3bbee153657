"""A Run in small, for what compares runs: one function of a Run, whatever kind it is.

A summary holds no trace: a few hundred numbers, whatever the run's length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..engine import techniques
from ..engine.categories import Category
from ..engine.config import RunConfig
from ..engine.difference import Owned, owned
from ..engine.events import Phase, StepTrace
from ..engine.ledger import Bytes, Ledger
from ..engine.module_names import OTHER_MODEL
from ..engine.run import Run, RunKind, highest_of
from .run_state import RunState, state_of
from .units import unit_for

LEAST_TOLD = 0.001
"""Share of the peak from which what a script holds besides is worth a word."""


class RunSummary(NamedTuple):
    """A run in small.

    Attributes:
        run: Whose.
        label: Short; what tells it from the others' defaults: `B8×S256 lora`.
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
        median_seconds: Of its last steps.
        tokens_per_s: Of its last step.
        steps: That ended.
        highest_bytes: By the allocator's own counter, of untraced steps too; None: not known.
        times: How many runs of this configuration it stands for: named after the first, with the figures of the latest.
        caveat: What to know when it is compared with the run that has.
    """

    run: Run
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
    median_seconds: float | None
    tokens_per_s: float | None
    steps: int
    highest_bytes: int | None = None
    times: int = 1
    caveat: str = ""

    @property
    def predicted(self) -> bool:
        """True if it has not happened."""
        return self.run.kind is RunKind.PREDICTED

    @property
    def peak_bytes(self) -> int:
        """Bytes of all categories at the peak."""
        return sum(self.peak.values())


def summarize(
    run: Run, origin: str, state: RunState | None = None, fold: Callable[[StepTrace], Ledger] = Ledger
) -> RunSummary:
    """A run in small, from the traces that are kept of it; of one without any, all is empty.

    Args:
        run: Which; a step that an error ended counts as far as it came.
        origin: Where it is from: `run 2`, or a recording's name.
        state: What it told, if that is folded already.
        fold: Folds a trace, or knows its fold.
    """
    told = state or state_of(run)
    traces = run.traces()
    ledgers, highest_trace = [fold(trace) for trace in traces], highest_of(traces)
    highest = next((ledger for ledger in ledgers if ledger.trace is highest_trace), None)
    complete = {ledger.trace.step: ledger for ledger in ledgers if ledger.trace.is_complete}
    by_phase: dict[Phase, int] = {}
    for ledger in ledgers:
        for phase, most in ledger.highest_by_phase.items():
            by_phase[phase] = max(by_phase.get(phase, 0), most)
    return RunSummary(
        run=run,
        label=techniques.label(run.config),
        origin=origin,
        config=run.config,
        loaded=complete[0].end if 0 in complete else None,
        after_step=complete[1].after(Phase.OPTIMIZER) if 1 in complete else None,
        peak=highest.peak.by_category if highest else dict.fromkeys(Category, 0),
        peak_where=_where(highest.peak.step, highest.peak.phase.title) if highest else "",
        peak_module=highest.peak.module if highest else "",
        by_phase=by_phase,
        by_layer=_by_layer(highest) if highest else {},
        by_owner=owned(highest, highest.peak.event) if highest else {},
        saved_by_layer=highest.saved_by_layer if highest else None,
        median_seconds=told.median_seconds,
        tokens_per_s=told.tokens_per_s,
        steps=told.step,
        highest_bytes=told.peak_bytes,
    )


def _by_layer(ledger: Ledger) -> dict[str, int]:
    return {layer: sum(sizes.values()) for layer, sizes in ledger.by_layer(ledger.peak.event).items()}


def predicted_beside(prediction: Run, run: Run, origin: str, of_script: Ledger | None = None) -> RunSummary:
    """A run as it was predicted, in small, to be set beside the run itself.

    Args:
        prediction: Of the run's configuration.
        run: The one that happened.
        origin: Of that run.
        of_script: Its highest step, if the loop is a script's own; None: it is ours.
    """
    versions = _other_versions(prediction.environment.packages, run.environment.packages)
    caveats = [versions, _other_loop(of_script) if of_script is not None else ""]
    return summarize(prediction, f"{origin}, predicted")._replace(caveat="; ".join(filter(None, caveats)))


def _other_loop(ledger: Ledger) -> str:
    """The parts of a script's own step that a prediction, which is of our loop, does not have."""
    passes = Counter(span.micro_batch for span in ledger.trace.phases if span.phase is Phase.FORWARD)
    most, held = max(passes.values(), default=1), owned(ledger, ledger.peak.event)
    besides = sum(size for owners in held.values() for name, size in owners.items() if OTHER_MODEL in name)
    script = ledger.peak.by_category[Category.HELD_BY_SCRIPT]
    told = [f"{most} forward passes before a backward"] * (most > 1) + [
        f"{unit_for(size).full(size)} {what}"
        for size, what in ((besides, "of other models"), (script, "held by the script"))
        if size >= LEAST_TOLD * ledger.peak.bytes
    ]
    without = f", without its {', '.join(told)}" * bool(told)
    return f"~ is gpumem-tui's own loop with the script's settings{without}"


def _other_versions(predicting: Mapping[str, str], running: Mapping[str, str]) -> str:
    """The libraries that a run and its prediction do not have in common: they may allocate otherwise."""
    both = {name: (version.split("+")[0], running[name].split("+")[0])
            for name, version in predicting.items() if name in running}  # fmt: skip
    told = [f"{name} {one} (run: {other})" for name, (one, other) in both.items() if one != other]
    return f"~ predicted with {', '.join(told)}" if told else ""


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
