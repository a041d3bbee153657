"""The screens: every module of this folder that defines a `Page` with a place is one.

Adding a screen is adding a file here; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from .page import Page


@cache
def screens() -> tuple[type[Page], ...]:
    """The screens in the order of their places, which are the digits that lead to them. Loads no torch."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    found = [kind for kind in kinds if issubclass(kind, Page) and kind.place]
    return tuple(sorted(found, key=lambda kind: kind.place))
