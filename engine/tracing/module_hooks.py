"""Hooks on modules that leave no trace on them.

A hook registered on a module is an attribute of it: it is pickled, copied and
exported with it, or keeps it from being. Torch's global hooks have each module's
call take a slow path, and what is compiled is guarded by their number. These stand
around `torch.nn.Module.__call__`, for as long as there are any, and look up which
module they are called for. While a region is compiled, exported or traced they do
nothing.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_module

Before = Callable[[torch.nn.Module, Any], None]
"""Called before a module's forward, with its positional arguments."""

After = Callable[[torch.nn.Module, Any, Any], None]
"""Called after it, with what it returned; None also if it raised."""

_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing


class Hooked(NamedTuple):
    """The functions called for one module."""

    module: weakref.ref[torch.nn.Module]
    before: Before
    after: After


class ModuleHooks:
    """The hooks of this process.

    They stand around the hooks of a module's own. Those that were added first
    are called first before a forward and last after it.
    """

    def __init__(self) -> None:
        self._hooked: dict[int, tuple[Hooked, ...]] = {}
        self._of_all: tuple[Before, ...] = ()
        self._uninstall: Callable[[], bool] | None = None

    def add(self, module: torch.nn.Module, before: Before, after: After) -> Callable[[], None]:
        """Hook a module; call what is returned to undo it."""
        hooked = Hooked(weakref.ref(module), before, after)
        # A module is held weakly, so its number may have been another's.
        others = tuple(other for other in self._hooked.get(id(module), ()) if other.module() is module)
        self._hooked[id(module)] = (*others, hooked)
        self._install()
        return partial(self._remove, id(module), hooked)

    def add_to_all(self, before: Before) -> Callable[[], None]:
        """Hook every module there is; call what is returned to undo it."""
        self._of_all = (*self._of_all, before)
        self._install()

        def undo() -> None:
            self._of_all = tuple(other for other in self._of_all if other is not before)
            self._close_if_unused()

        return undo

    def _remove(self, key: int, hooked: Hooked) -> None:
        left = tuple(other for other in self._hooked.get(key, ()) if other is not hooked)
        if left:
            self._hooked[key] = left
        else:
            self._hooked.pop(key, None)
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._hooked and not self._of_all and self._uninstall is not None and self._uninstall():
            self._uninstall = None

    def _install(self) -> None:
        if self._uninstall is not None:
            return
        call, hooked = torch.nn.Module.__call__, self._hooked

        @functools.wraps(call)
        def hooked_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if _is_compiling() or _is_tracing() or not (id(module) in hooked or self._of_all):
                return call(module, *args, **kwargs)
            return self._around(call, module, args, kwargs)

        def uninstall() -> bool:
            if torch.nn.Module.__call__ is not hooked_call:
                return False  # somebody has put something around it: it stays, to be used again and not put in twice
            torch.nn.Module.__call__ = call  # type: ignore[method-assign]
            return True

        torch.nn.Module.__call__ = hooked_call  # type: ignore[method-assign]
        self._uninstall = uninstall

    def _around(self, call: Callable[..., Any], module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module between its hooks; `keyword_arguments` looks for this frame."""
        hooks = self._hooked.get(id(module), ())  # whoever hooks it from here on has missed the beginning
        for before in self._of_all:
            before(module, args)
        for hooked in hooks:
            if hooked.module() is module:
                hooked.before(module, args)
        output = None
        try:
            output = call(module, *args, **kwargs)
        finally:  # a recompute that stops early leaves modules by exception
            for hooked in self._hooked.get(id(module), ())[::-1]:
                if hooked.module() is module:
                    hooked.after(module, args, output)
        return output


def keyword_arguments() -> Mapping[str, Any]:
    """The keyword arguments that a module is being called with; for use in a hook before its forward.

    Hooks are not given them: they are read from the frame that calls the module.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is ModuleHooks._around.__code__ or code.co_filename == torch_module.__file__:
            kwargs = frame.f_locals.get("kwargs")
            return kwargs if isinstance(kwargs, Mapping) else {}
        frame = frame.f_back
    return {}


module_hooks = ModuleHooks()
"""The hooks of all that is watched in this process."""
