"""Memory in the figures that a Trainer logs, and so in whatever it reports to: W&B, MLflow, TensorBoard, Trackio.

A Trainer's callbacks are told of a log after its reporters, so a callback that
changed the figures would come too late. What hands them to all callbacks is
extended instead, for as long as the training lasts and for that trainer only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..ledger import Ledger
from ..prediction.gpus import gpu_of
from ..prediction.outcome import Prediction
from ..prediction.predictor import NICENESS, Predictor
from ..run import Run
from ..run_events import StepEnded

PREFIX = "memory/"


@contextmanager
def logged(callback: TrainerCallback, figures: Callable[[], dict[str, int]]) -> Iterator[None]:
    """Have the trainer of a callback log more figures, for as long as the block lasts.

    Args:
        callback: Tells the trainer from others.
        figures: Asked at every log; must not raise.
    """
    before = CallbackHandler.on_log

    def on_log(handler: Any, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> Any:
        if callback in handler.callbacks:
            found = figures()
            logs.update(found)
            if state.log_history:  # written a moment ago, of the same figures
                state.log_history[-1].update(found)
        return before(handler, args, state, control, logs, **kwargs)

    CallbackHandler.on_log = on_log
    try:
        yield
    finally:
        CallbackHandler.on_log = before


def figures_of(run: Run | None, predicted: PredictedPeak) -> dict[str, int]:
    """Bytes to be logged: of the last step by the allocator's counters, and its peak by category if it was traced.

    Args:
        run: Watched; None before its first step: there are no figures.
        predicted: Asked about it.
    """
    if run is None:
        return {}
    predicted.ask(run)
    found: dict[str, int] = {} if predicted.bytes is None else {"predicted_peak": predicted.bytes}
    step = next((event for event in reversed(run.events()) if isinstance(event, StepEnded)), None)
    if step is not None:
        known = {"allocated": step.allocated_bytes, "peak": step.peak_bytes, "reserved": step.reserved_bytes}
        found |= {name: size for name, size in known.items() if size is not None}
    trace = next((trace for trace in reversed(run.traces()) if trace.is_complete and trace.step), None)
    if trace is not None:
        peak = Ledger(trace).peak
        found |= {category.key: size for category, size in peak.by_category.items()}
        found.setdefault("peak", peak.bytes)
    return {f"{PREFIX}{name}": size for name, size in found.items()}


class PredictedPeak:
    """The peak that is predicted of a watched run on its GPU, worked out by a process that gives way to the training.

    Attributes:
        bytes: None: not known yet, or never: on a CPU, and where the model is not one that can be built anew.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._predictor: Predictor | None = None

    def ask(self, run: Run) -> None:
        """Ask for what is known of the run by now, and look whether an answer has come; returns at once."""
        config = run.config
        if config.architecture is None or not run.environment.on_gpu:
            return
        if self._predictor is None:
            self._predictor = Predictor(gpu_of(run.environment), NICENESS)
        answer = self._predictor.get(config)
        if answer is None:
            self._predictor.want([config])
        self.bytes = answer.peak_bytes if isinstance(answer, Prediction) else None

    def close(self) -> None:
        """End the process."""
        if self._predictor is not None:
            self._predictor.close()
            self._predictor = None
