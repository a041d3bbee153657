"""The hooks of the model that is traced, on it only while steps are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from .hooks import Guard, Tagger, tag_modules, tag_steps_in_backward, unguarded


class ModelTagging:
    """Hooks that can be put on a model and taken off again while it is attached.

    Idle hooks would cost the steps of a launch-bound run that are not traced 2 %.

    Args:
        tagger: That the hooks talk to.
    """

    def __init__(self, tagger: Tagger) -> None:
        self._tagger = tagger
        self._model: torch.nn.Module | None = None
        self._guard: Guard = unguarded
        self._hooks: ExitStack | None = None
        self._hooked = False

    @contextmanager
    def attached(self, model: torch.nn.Module, guard: Guard) -> Iterator[None]:
        """Let `on` put hooks on a model; they are gone on leaving.

        Args:
            model: Which.
            guard: See `tag_modules`.
        """
        self._model, self._guard = model, guard
        try:
            with ExitStack() as self._hooks:
                yield
        finally:
            self._model, self._hooks, self._hooked = None, None, False

    def on(self) -> None:
        """Put the hooks on, if a model is attached."""
        if self._hooks is not None and self._model is not None and not self._hooked:
            self._hooks.enter_context(tag_modules(self._model, self._tagger, self._guard))
            self._hooks.enter_context(tag_steps_in_backward(self._tagger, self._guard))
            self._hooked = True

    def off(self) -> None:
        """Take them off."""
        if self._hooks is not None:
            self._hooks.close()
            self._hooked = False
