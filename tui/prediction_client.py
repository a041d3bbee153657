"""Predictions for the screens, worked out in a process beside the training."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..engine.config import RunConfig, UserError
from ..engine.events import Environment, StepTrace
from ..engine.feed import Source
from ..engine.out_of_memory.report import OutOfMemoryReport
from ..engine.prediction.expandable import expandable_reserved_bytes
from ..engine.prediction.gpus import Gpu, gpu, gpu_of
from ..engine.prediction.outcome import Prediction
from ..engine.prediction.predictor import Predictor
from ..engine.run import Run
from .fix_finder import FixFinder
from .predictions import FoundFixes

WORKING = "The prediction of this run is being worked out."

EXPANDABLE_EVERY_S = 5.0
"""Playing a step to the allocator's model takes some 50 ms: that often."""

REMEMBERED = 48
"""Wishes that are not answered yet; older ones are those of a screen long left."""


class Background:
    """Predicts in a process of its own, what somebody waits for first.

    Args:
        source: Whose device it is for.
        wanted: Name of the GPU to predict for; empty: the one of the engine,
            or `WITHOUT_A_GPU`.

    Raises:
        UserError: No such GPU.
    """

    def __init__(self, source: Source, wanted: str = "") -> None:
        self._source = source
        self._gpu = gpu(wanted) if wanted else None
        self._predictor: Predictor | None = None
        self._here: Environment | None = None
        self._looked_at: Environment | None = None
        self._target: Gpu | None = None
        self._asked: dict[str, tuple[RunConfig, bool]] = {}
        self._finder: FixFinder | None = None
        self._expandable: tuple[float, int] | None = None
        self.gpu_name = ""

    def look_at(self, environment: Environment) -> None:
        """Predict for where this is from now on: the run on the screens is of that machine."""
        self._looked_at = environment

    def waiting(self) -> int:
        """Number of predictions that are still being worked out."""
        return self.unanswered([config for config, _ in self._asked.values()])

    def unanswered(self, configs: Sequence[RunConfig]) -> int:
        """Number of these of which neither a prediction is known nor the reason why there is none."""
        known = self._predictor
        return sum(known is None or known.get(config) is None for config in configs)

    def answers(self) -> int:
        """Number of predictions worked out."""
        found = self._finder.found if self._finder is not None else FoundFixes()
        known = self._predictor.answers() if self._predictor is not None else 0
        return known + len(found.fixes) + found.over

    def of(self, config: RunConfig, hurry: bool = True) -> Prediction | None:
        """The prediction if it is known; a wish for it if not."""
        environment = self._looked_at or self._source.environment()
        if environment is None:
            return None
        predictor = self._for(environment)
        answer = predictor.get(config)
        key = repr(config)
        if answer is not None:
            self._asked.pop(key, None)
            return None if isinstance(answer, UserError) else answer
        if key not in self._asked or hurry > self._asked[key][1]:
            self._asked.pop(key, None)
            self._asked[key] = config, hurry
            for old in list(self._asked)[:-REMEMBERED]:
                del self._asked[old]
            some, others = ([c for c, hurried in self._asked.values() if hurried is wanted] for wanted in (True, False))
            predictor.want(some + others)
        return None

    def problem(self, config: RunConfig) -> str:
        """The reason why a configuration cannot be predicted; empty: it can, or that is not known yet."""
        answer = self._predictor.get(config) if self._predictor is not None else None
        return str(answer) if isinstance(answer, UserError) else ""

    def _for(self, environment: Environment) -> Predictor:
        """The predictor for the GPU there; a recording of another GPU may be looked at by now."""
        if self._predictor is None or environment != self._here:
            target = self._gpu or gpu_of(environment)
            if self._predictor is None or target != self._target:
                self.close()
                self._asked.clear()
                self.gpu_name, self._predictor = target.name, Predictor(target)
            self._here, self._target = environment, target
        return self._predictor

    def drop(self) -> None:
        """Work out no more of what was asked for; what has been begun ends."""
        self._asked.clear()
        if self._predictor is not None:
            self._predictor.want([])

    def of_run(self, run: Run) -> Prediction | str:
        """The prediction of a run; a line that says why nothing can be set beside it."""
        environment, config = run.environment, run.config
        if not environment.on_gpu:
            return "No prediction is set beside this run: it is on a CPU, predictions are of GPUs."
        here = gpu_of(environment)
        if self._gpu is not None and not alike(self._gpu, here):
            return f"No prediction is set beside this run: it is on {here.name}, predictions are of {self._gpu.name}."
        found = self.of(config)
        if found is not None:
            return found
        problem = self.problem(config)
        return f"No prediction of this run: {problem}." if problem else WORKING

    def fixes(self, run: Run, report: OutOfMemoryReport) -> FoundFixes:
        """Fixes found so far; another run than before, or its next refusal, ends the search for that one's."""
        if self._finder is None or self._finder.run is not run or self._finder.report != report:
            self._end_search()
            self._finder = FixFinder(run, report)
        return self._finder.found

    def expandable_bytes(self, trace: StepTrace) -> int:
        """The most that would have been reserved for a step; of the steps after it as well, which are alike."""
        now = time.monotonic()
        if self._expandable is None or now - self._expandable[0] > EXPANDABLE_EVERY_S:
            self._expandable = (now, expandable_reserved_bytes(trace))
        return self._expandable[1]

    def _end_search(self) -> None:
        if self._finder is not None:
            self._finder.close()
            self._finder = None

    def close(self) -> None:
        """End the processes."""
        self._end_search()
        if self._predictor is not None:
            self._predictor.close()


def alike(one: Gpu, other: Gpu) -> bool:
    """True if a run allocates the same on both; how much memory they have does not matter to that."""
    return all(getattr(one, name) == getattr(other, name) for name in ("capability", "multiprocessors", "threads"))
