"""The predictions that screens show: the run's own, and the changes that would save most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..engine import techniques
from ..engine.config import Value
from ..engine.events import Phase, StepTrace
from ..engine.out_of_memory.report import OutOfMemoryReport
from ..engine.prediction.advice import LEAST_SAVING_BYTES, most_promising_first, single_changes
from ..engine.run import Run
from ..engine.technique import Effect
from .changes import Changes
from .predictions import FoundFixes, Predictions
from .run_summary import RunSummary, predicted_beside
from .state import ViewState


class Saving(NamedTuple):
    """A change of a single technique, and what it would do.

    Attributes:
        changes: Settings by name: mostly one, two where they go together (accumulation with a smaller batch).
        saved_bytes: At the predicted peak.
        effect: On the training.
    """

    changes: Mapping[str, Value]
    saved_bytes: int
    effect: Effect


class Strongest(NamedTuple):
    """The changes of a single technique that save most at the predicted peak, as far as they are known.

    Attributes:
        found: The change that keeps the mathematics, then those that save more and do not; each saves more
            than those before it. Of changes with the same effect the best of one setting, then of two.
        tried: Number of changes worked out.
        of: Number of changes there are.
    """

    found: tuple[Saving, ...]
    tried: int
    of: int


class Forecasts:
    """Predictions about the run on the screens.

    Args:
        state: The run, and the engine's or a recording's.
        changes: The configuration that changes start from, and which of them can be had.
        predictions: Peaks of configurations that have not run; None: nobody predicts.

    Attributes:
        enabled: Whether anything is asked of `predictions`.
    """

    def __init__(self, state: ViewState, changes: Changes, predictions: Predictions | None) -> None:
        self.state = state
        self.enabled = True
        self._changes, self._predictions = changes, predictions
        self._own: tuple[object, RunSummary | str] | None = None

    @property
    def predictions(self) -> Predictions | None:
        """The predictions to ask; None if nobody predicts or nothing is to be asked."""
        return self._predictions if self.enabled else None

    @property
    def answers(self) -> int | None:
        """Number of predictions known: what shows some is drawn anew when it changes; None: nobody is asked."""
        return self.predictions.answers() if self.predictions is not None else None

    def enable(self, enabled: bool) -> None:
        """Ask for predictions, or no longer: those still to be worked out are not begun."""
        self.enabled = enabled
        if self._predictions is not None and not enabled:
            self._predictions.drop()

    def turned(self) -> None:
        """Predict for the machine of the run that is on the screens now."""
        if self._predictions is not None and self.state.shown is not None:
            self._predictions.look_at(self.state.shown.environment)

    def fixes(self, run: Run, report: OutOfMemoryReport) -> FoundFixes | None:
        """The changes with which a run would have fitted, as far as they are known; None: nobody predicts."""
        return self.predictions.fixes(run, report) if self.predictions is not None else None

    def expandable_bytes(self, trace: StepTrace) -> int | None:
        """The most that would be reserved for a step with expandable segments; None: nobody predicts."""
        return self.predictions.expandable_bytes(trace) if self.predictions is not None else None

    def strongest(self) -> Strongest | None:
        """The changes of a single technique that save most, as far as they are known; None if nobody can say."""
        base, predictions = self.state.run.config or self._changes.base(), self.predictions
        if base is None or predictions is None:
            return None
        now = predictions.of(base, hurry=False) if not self.impossible() else None
        changes = [one for one in single_changes(base) if self._changes.problem(base.with_(one)) is None]
        configs = [base.with_(one) for one in changes]
        if self.impossible() or (now is None and not predictions.unanswered([base])):
            return None  # nothing will come to subtract from
        # Asked for before the run itself is known, they would be worked out in any order.
        for i in most_promising_first(now, changes) if now is not None else ():
            predictions.of(configs[i], hurry=False)
        then = [predictions.of(config, hurry=False) for config in configs] if now is not None else [None] * len(configs)
        tried = len(configs) - predictions.unanswered(configs) if now else 0
        savings = [
            Saving(one, now.peak_bytes - found.peak_bytes, techniques.effect(base, config))
            for one, config, found in zip(changes, configs, then, strict=True)
            if now is not None and found is not None
        ]
        savings.sort(key=lambda one: (one.effect, len(one.changes), -one.saved_bytes))
        best: list[Saving] = []
        for saving in savings:
            if saving.saved_bytes - (best[-1].saved_bytes if best else 0) >= LEAST_SAVING_BYTES:
                best.append(saving)
        return Strongest(tuple(best), tried, len(configs))

    def named(self) -> Mapping[str, Value]:
        """The values of the single settings that are named as what saves most: of a setting, the one to try first."""
        best = self.strongest() if self.state.requested is None else None
        found = best.found if best is not None else ()
        return {n: v for saving in reversed(found) if len(saving.changes) == 1 for n, v in saving.changes.items()}

    def impossible(self) -> str:
        """The reason why nothing of the shown run can be predicted; empty: it can, or that is not known yet."""
        config, predictions = self.state.run.config or self._changes.base(), self.predictions
        if config is None or predictions is None:
            return ""
        if self.state.run.imported:
            return "a snapshot does not say what was trained"
        step = self.state.complete if self.state.run.watched else None
        if step is not None and not any(span.phase is Phase.OPTIMIZER for span in step.trace.phases):
            return "the script uses its model and trains nothing"
        return predictions.problem(config)

    def of_shown(self) -> RunSummary | str:
        """The run on the screens as it was predicted, a run of its own; if it is a prediction, itself.

        Returns:
            A line that says why there is none to set beside it, empty if nobody predicts.
        """
        shown, predictions, state = self.state.shown, self.predictions, self.state
        if shown is None:
            return ""
        if state.run.predicted:
            return state.summary_of(shown)
        if predictions is None:
            return ""
        if problem := self.impossible():
            return f"No prediction is set beside this run: {problem}."
        key = (shown, shown.config, state.peak, predictions.answers())
        if self._own is None or self._own[0] != key:
            found, of_script = predictions.of_run(shown), state.peak if state.run.watched else None
            said = found if isinstance(found, str) else (
                predicted_beside(found.run, shown, state.origin_of(shown), of_script)
            )  # fmt: skip
            self._own = (key, said)
        return self._own[1]
