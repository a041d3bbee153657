"""Assumptions of a prediction about what depends on data, each with its place in the script."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
"""Places that no reader can do anything about: PyTorch, this program, generated code."""


class Assumptions:
    """The assumptions made, once for each place."""

    def __init__(self) -> None:
        self._said: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """A line each, in the order in which they came up."""
        return tuple(self._said)

    def say(self, what: str, of: Callable[..., Any] | None = None) -> None:
        """Something is taken for granted.

        Args:
            what: In words.
            of: The script's function that it concerns; None: the line that runs now.
        """
        place = place_of_frame(sys._getframe(1)) if of is None else _place_of_function(of)
        self._said.setdefault(f"{place}: {what}." if place else f"{what}.")

    def number(self, tensor: Any, value: Any, decides: bool) -> Any:
        """A number that is read from a tensor.

        Args:
            tensor: From which.
            value: What it is taken to be.
            decides: Whether reading it is deciding by it, as `if tensor` does.

        Returns:
            The number; where it is not known, one that says so when anything is decided by it.
        """
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
            return value

        def say() -> None:
            # PyTorch itself asks as well, whether a norm is finite for example: that is as it is in every run.
            if not _of_library(sys._getframe(3 if decides else 2)):
                self.say(f"a number read from a tensor decides what is done: it is taken to be {value!r}")

        if decides:
            say()
            return value
        if isinstance(value, bool):
            return value
        return _known_as(value, say)


class _Float(float):
    """A number of which nobody knows what it is."""

    said: Callable[[], None]


class _Int(int):
    """Likewise."""

    said: Callable[[], None]


def _known_as(value: float, say: Callable[[], None]) -> Any:
    number: Any = _Int(value) if isinstance(value, int) else _Float(value)
    number.said = say
    return number


def _deciding(name: str, base: Any) -> Callable[..., Any]:
    operation = getattr(base, name)

    def call(self: Any, *others: Any) -> Any:
        self.said()
        return operation(self, *others)

    return call


def _computing(name: str, base: Any) -> Callable[..., Any]:
    operation = getattr(base, name)

    def call(self: Any, *others: Any) -> Any:
        result = operation(self, *others)
        return _known_as(result, self.said) if type(result) in (int, float) else result

    return call


for _kind, _base in ((_Float, float), (_Int, int)):
    for _name in ("lt", "le", "gt", "ge", "eq", "ne", "bool"):
        setattr(_kind, f"__{_name}__", _deciding(f"__{_name}__", _base))
    for _name in ("add", "sub", "mul", "truediv", "pow", "neg", "abs", "radd", "rsub", "rmul", "rtruediv"):
        setattr(_kind, f"__{_name}__", _computing(f"__{_name}__", _base))
    _kind.__hash__ = _base.__hash__  # type: ignore[method-assign]


def place_of_frame(frame: FrameType | None) -> str:
    """`file:line` of the innermost frame that is no library's; empty if there is none."""
    while frame is not None and _of_library(frame):
        frame = frame.f_back
    return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""


def _place_of_function(function: Callable[..., Any]) -> str:
    """`file:line` of a function of the script's; empty if it is none."""
    code = getattr(function, "__code__", None)
    return f"{_shown(code.co_filename)}:{code.co_firstlineno}" if code is not None else ""


def place_of_error(error: BaseException) -> str:
    """`file:line` of the innermost frame of an error's that is no library's; empty if there is none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if not _of_library(trace.tb_frame):
            found = _line(trace)
        trace = trace.tb_next
    return found


def _line(trace: TracebackType) -> str:
    return f"{_shown(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"


def _of_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_LIBRARIES)


def _shown(path: str) -> str:
    """A path as short as it can be written from here."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
