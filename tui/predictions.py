"""What the screens ask of whoever can tell a peak before a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..engine.config import RunConfig
from ..engine.events import Environment
from ..engine.prediction.outcome import Prediction
from ..engine.run import Run


class Predictions(Protocol):
    """Somebody who predicts.

    Attributes:
        gpu_name: For which GPU; empty: not known yet.
    """

    gpu_name: str

    def look_at(self, environment: Environment) -> None:
        """Predict for where this is from now on."""
        ...

    def of(self, config: RunConfig, hurry: bool = True) -> Prediction | None:
        """What is known of a configuration; returns at once, None while it is being worked out.

        Args:
            config: Which.
            hurry: Whether somebody waits for it.
        """
        ...

    def of_run(self, run: Run) -> Prediction | str:
        """Of a run, for the GPU it ran on; a line that says why nothing can be set beside it."""
        ...

    def waiting(self) -> int:
        """How many are still being worked out."""
        ...

    def unanswered(self, configs: Sequence[RunConfig]) -> int:
        """For how many of these neither a prediction is known nor why there can be none."""
        ...

    def drop(self) -> None:
        """Work out no more of what was asked for."""
        ...

    def answers(self) -> int:
        """How many have been worked out: when it grows, there is something to draw."""
        ...
