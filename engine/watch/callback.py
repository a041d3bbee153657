"""Watching `transformers.Trainer` and what builds on it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from .trackers import PredictedPeak, figures_of, logged
from .watcher import watch


class MemoryCallback(TrainerCallback):  # type: ignore[misc]
    """`Trainer(..., callbacks=[MemoryCallback()])`: watched from the first step to the last.

    Args:
        name: Of the engine in `gpumem-tui ps`; the script's name if None.
        every_step: See `watch`.
        log: Have the trainer log bytes as `memory/<category>` at the peak of the last traced step, with
            `memory/peak` and `memory/allocated` of the last step and, on a GPU, `memory/reserved` and
            `memory/predicted_peak`: to whatever it reports to.
    """

    def __init__(self, name: str | None = None, *, every_step: bool = False, log: bool = False) -> None:
        self._name, self._every_step, self._log = name, every_step, log
        self._logging, self._predicted = ExitStack(), PredictedPeak()
        self.watch: watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Model and optimizer are made and placed: begin."""
        self.close()  # a training before that raised told us nothing
        optimizer = kwargs.get("optimizer")
        if optimizer is None:  # DeepSpeed's, without one of torch's
            return
        try:
            self.watch = watch(
                kwargs["model"], optimizer, name=self._name, every_step=self._every_step,
                accumulation=getattr(args, "gradient_accumulation_steps", None),
            )  # fmt: skip
        except TypeError:  # none of torch's
            return
        self.watch.begin()
        if self._log:
            self._logging.callback(self._predicted.close)
            self._logging.enter_context(logged(self, self._figures))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self.close()

    def close(self) -> None:
        """Stop watching; needed only after a training that raised."""
        self._logging.close()
        if self.watch is not None:
            self.watch.end()
            self.watch = None

    def _figures(self) -> dict[str, int]:
        """Figures for the log; a failure of ours is no failure of the training."""
        if self.watch is None:
            return {}
        source = self.watch.source
        return source.barrier.guard(figures_of)(source.run, self._predicted) or {}
