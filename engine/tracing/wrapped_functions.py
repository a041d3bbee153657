"""Functions of a library that are wrapped for as long as somebody listens to what they tell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..listeners import Listener, Listeners


class WrappedFunctions(Listeners[Listener]):
    """The wrapped functions of one library, and their listeners.

    Several runs of one process may listen; the first has the functions wrapped, and
    after the last they are what they were.

    Args:
        wrap_all: Wraps them, each with its removal pushed right after it.
    """

    def __init__(self, wrap_all: Callable[[ExitStack], None]) -> None:
        super().__init__()
        self._wrap_all = wrap_all
        self._undo = ExitStack()

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """Have a listener told, until the context is left."""
        if not self.listeners:
            with ExitStack() as undo:
                self._wrap_all(undo)
                self._undo = undo.pop_all()
        try:
            with super().heard_by(listener):
                yield
        finally:
            if not self.listeners:
                self._undo.close()


def wrap(
    undo: ExitStack,
    owner: Any,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    """Wrap a function of a module, a class or an object, if this version of the library has it.

    Args:
        undo: Is given its removal.
        owner: The module, the class or the object.
        name: Of the function.
        before: Called with its arguments.
        after: Called with what it returned, and its arguments.
    """
    call = getattr(owner, name, None)
    if call is None:
        return

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = call(*args, **kwargs)
        if after is not None:
            after(result, *args, **kwargs)
        return result

    # What it really is: a method of C++'s is no longer one when it has been looked up on its class.
    own = vars(owner).get(name)
    setattr(owner, name, wrapped)
    undo.callback(setattr, owner, name, own) if own is not None else undo.callback(delattr, owner, name)
