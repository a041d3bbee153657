"""Our frames, taken out of the tracebacks of a script's own errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_OURS = str(Path(__file__).parents[1])
_TORCH = Path(torch.__file__).parent
_BEFORE = {str(_TORCH / "_compile.py"), str(_TORCH / "_dynamo" / "eval_frame.py")}
_AFTER = {str(_TORCH / "_ops.py")}


def hide_our_frames(error: BaseException) -> None:
    """Take the frames that watching adds out of an error's traceback, and of all it was raised from or during.

    A dispatch mode stands between an operator and its caller: its frame goes,
    with those that torch puts around it. The first frame of a traceback, where
    the error was caught, always stays.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        _relink(found.__traceback__)
        waiting += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions


def _relink(first: TracebackType | None) -> None:
    links = list(_links(first))
    files = [link.tb_frame.f_code.co_filename for link in links]
    ours = [index for index, file in enumerate(files) if file.startswith(_OURS)]
    hidden = set(ours)
    for index in ours:
        before = index - 1
        while before >= 0 and files[before] in _BEFORE:
            hidden.add(before)
            before -= 1
        if index + 1 < len(files) and files[index + 1] in _AFTER:
            hidden.add(index + 1)
    kept = [link for index, link in enumerate(links) if index == 0 or index not in hidden]
    for link, following in zip(kept, [*kept[1:], None], strict=False):
        link.tb_next = following


def _links(link: TracebackType | None) -> Iterator[TracebackType]:
    while link is not None:
        yield link
        link = link.tb_next


class _ErrorPrinting:
    """Takes our frames out of an error that ends the script, for as long as anything is watched."""

    def __init__(self) -> None:
        self._users, self._before = 0, sys.excepthook

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._users:
            self._before, sys.excepthook = sys.excepthook, self._print
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users and sys.excepthook == self._print:
                sys.excepthook = self._before

    def _print(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        with contextlib.suppress(Exception):
            hide_our_frames(error)
        return self._before(kind, error, trace)


our_frames_hidden = _ErrorPrinting()
"""Have an error that ends the script printed without our frames, until the context is left."""
