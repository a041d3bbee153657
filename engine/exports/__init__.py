"""The registry of formats: every module of this folder that exports a FORMAT is one.

Adding a format is adding a file here; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from ..atomic_file import replacing
from ..config import UserError, did_you_mean
from ..feed import Work
from .exported_run import ExportedRun, Format, Sink


@cache
def registry() -> Mapping[str, Format]:
    """Every format by name. Loads no torch."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    found: list[Format] = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return MappingProxyType({made.name: made for made in sorted(found, key=lambda f: f.name)})


def format_named(name: str) -> Format:
    """A format by its name.

    Raises:
        UserError: There is none of that name.
    """
    known = registry()
    if name not in known:
        hint = did_you_mean(name, known, "known: " + ", ".join(known))
        raise UserError(f"--format {name}: there is no such format; {hint}")
    return known[name]


def export(runs: Sequence[ExportedRun], made: Format, path: Path, work: Work | None = None) -> None:
    """Write runs to a file, which is there whole or not at all.

    Args:
        runs: At least one.
        made: The format.
        path: Where.
        work: Told how far it is; asked whether to go on.

    Raises:
        OSError: It cannot be written there.
        UserError: A run has nothing that the format could say, or it was cancelled.
    """
    with replacing(path) as file:
        write(runs, made, file, work)


def write(runs: Sequence[ExportedRun], made: Format, file: BinaryIO, work: Work | None = None) -> None:
    """Write runs to an open file.

    Args:
        runs: At least one.
        made: The format.
        file: Opened for writing bytes.
        work: Told how far it is; asked whether to go on.

    Raises:
        OSError: It cannot be written.
        UserError: A run has nothing that the format could say, or it was cancelled.
    """
    work = work or Work()
    sink = Sink(file, work, sum(run.events for run in runs))
    made.write(runs, sink)
    work.share = 1.0
