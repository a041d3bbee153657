"""The registry: every module of this folder that exports SCHEMES describes some.

Adding a scheme is adding it to its family's file, or a file here; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from ..scheme import Scheme


@cache
def registry() -> Mapping[str, Scheme]:
    """Every scheme by its key, in the order they are listed. Loads no torch."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found: list[Scheme] = sorted((scheme for module in modules for scheme in module.SCHEMES), key=lambda s: s.order)
    return MappingProxyType({scheme.key: scheme for scheme in found})
