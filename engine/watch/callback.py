"""Watching `transformers.Trainer` and what builds on it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .watcher import watch


class MemoryCallback(TrainerCallback):  # type: ignore[misc]
    """`Trainer(..., callbacks=[MemoryCallback()])`: watched from the first step to the last.

    Args:
        name: Of the engine in `gpumem-tui ps`; the script's name if None.
        every_step: See `watch`.
    """

    def __init__(self, name: str | None = None, *, every_step: bool = False) -> None:
        self._name, self._every_step = name, every_step
        self.watch: watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Model and optimizer are made and placed: begin."""
        self.close()  # a training before that raised told us nothing
        try:
            self.watch = watch(kwargs["model"], kwargs["optimizer"], name=self._name, every_step=self._every_step)
        except (KeyError, TypeError):  # no optimizer of torch's, as with DeepSpeed
            return
        self.watch.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end."""
        self.close()

    def close(self) -> None:
        """Stop watching; needed only after a training that raised."""
        if self.watch is not None:
            self.watch.end()
            self.watch = None
