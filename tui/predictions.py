"""The interface by which screens ask for the peaks of runs that have not begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..engine.config import RunConfig
from ..engine.events import Environment, StepTrace
from ..engine.out_of_memory.report import Fix, OutOfMemoryReport
from ..engine.prediction.outcome import Prediction
from ..engine.run import Run


@dataclass(frozen=True, slots=True)
class FoundFixes:
    """Fixes, as far as they are known.

    Attributes:
        fixes: Those found so far, the best first; if nothing fits, the one that comes nearest.
        over: Nothing more will be found.
        unfit_by_bytes: If nothing fits: what the nearest lacks.
        problem: The reason why nothing can be predicted; empty otherwise.
    """

    fixes: tuple[Fix, ...] = ()
    over: bool = False
    unfit_by_bytes: int | None = None
    problem: str = ""

    @property
    def fitting(self) -> list[Fix]:
        """The values that fit."""
        return [fix for fix in self.fixes if fix.fits]


class Predictions(Protocol):
    """The predictor, as screens ask it.

    Attributes:
        gpu_name: For which GPU; empty: not known yet.
    """

    gpu_name: str

    def look_at(self, environment: Environment) -> None:
        """Predict for where this is from now on."""
        ...

    def of(self, config: RunConfig, hurry: bool = True) -> Prediction | None:
        """The prediction of a configuration; returns at once, None while it is being worked out.

        Args:
            config: Which.
            hurry: It comes before all that are in no hurry.
        """
        ...

    def problem(self, config: RunConfig) -> str:
        """The reason why a configuration cannot be predicted; empty: it can, or that is not known yet."""
        ...

    def of_run(self, run: Run) -> Prediction | str:
        """The prediction of a run, for the GPU it ran on; a line that says why nothing can be set beside it."""
        ...

    def fixes(self, run: Run, report: OutOfMemoryReport) -> FoundFixes:
        """The changes with which a run would have fitted, as far as they are known; returns at once."""
        ...

    def expandable_bytes(self, trace: StepTrace) -> int:
        """The most that the allocator would have reserved for a step with expandable segments."""
        ...

    def waiting(self) -> int:
        """Number of predictions that are still being worked out."""
        ...

    def unanswered(self, configs: Sequence[RunConfig]) -> int:
        """Number of these of which neither a prediction is known nor the reason why there is none."""
        ...

    def drop(self) -> None:
        """Work out no more of what was asked for."""
        ...

    def answers(self) -> int:
        """Number of predictions worked out: when it grows, there is something to draw."""
        ...
