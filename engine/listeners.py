"""Listeners that are told of something for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Listener = TypeVar("Listener")


class Listeners(Generic[Listener]):
    """The listeners of one kind, of every run in this process.

    Kept as a plain attribute: CUDA's backward runs on a thread of autograd's own,
    where a context variable of the engine's thread would not be seen.

    Attributes:
        listeners: Those that are to be told now.
    """

    def __init__(self) -> None:
        self.listeners: tuple[Listener, ...] = ()

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """Have a listener told, whoever else is, until the context is left."""
        self.listeners = (*self.listeners, listener)
        try:
            yield
        finally:
            place = self.listeners.index(listener)
            self.listeners = (*self.listeners[:place], *self.listeners[place + 1 :])
