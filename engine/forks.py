"""State that a forked child, such as a data loader's worker, must not go on with."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, cast


def in_child(method: Callable[[], Any]) -> None:
    """Call a bound method in every child forked from now on, for as long as its object lives.

    Python offers no way to take such a registration back, so it holds the
    object weakly.
    """
    bound = cast(MethodType, method)
    reference, function = weakref.ref(bound.__self__), bound.__func__

    def call() -> None:
        alive = reference()
        if alive is not None:
            function(alive)

    os.register_at_fork(after_in_child=call)
