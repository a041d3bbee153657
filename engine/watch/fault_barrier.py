"""Between what watches and the run that is watched: a failure here never becomes one there."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from ..config import one_line

log = logging.getLogger("gpumem_tui.watch")


class FaultBarrier:
    """The first exception in anything guarded is logged, and from then on all of it does nothing.

    Args:
        on_failure: Told of it, with one line and the traceback. Must not raise.

    Attributes:
        off: Whether that has happened.
    """

    def __init__(self, on_failure: Callable[[str, str], None]) -> None:
        self.off = False
        self._on_failure = on_failure

    def guard(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, returning None once anything has failed: for torch, "nothing changed"."""

        @wraps(hook, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.off:
                return None
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                self.failed(error)
                return None

        return guarded

    def finish(self, last: Callable[[], None]) -> None:
        """Something that is to be done also if all else is off; a failure of it is logged, and nobody's."""
        try:
            last()
        except Exception:
            log.warning("gpumem-tui: watching did not end in order; the run goes on", exc_info=True)

    @contextmanager
    def around(self, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """A context of ours around a body of the run's: its exceptions pass, ours do not."""
        ours = None if self.off else self._enter(make)
        try:
            yield
        except BaseException as error:
            if ours is not None:
                self._leave(ours, error)
            raise
        if ours is not None:
            self._leave(ours, None)

    def _enter(self, make: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any] | None:
        try:
            made = make()
            made.__enter__()
        except Exception as error:
            self.failed(error)
            return None
        return made

    def _leave(self, ours: AbstractContextManager[Any], error: BaseException | None) -> None:
        try:
            ours.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Exception as failure:
            if failure is not error:
                self.failed(failure)

    def failed(self, error: BaseException) -> None:
        """Switch everything off and say so, once."""
        if self.off:
            return
        self.off = True
        text = one_line(error)
        log.warning("gpumem-tui: watching failed and was switched off; the run goes on: %s", text, exc_info=error)
        self._on_failure(text, "".join(traceback.format_exception(error)))
