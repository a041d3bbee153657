"""Hooks on modules that leave no trace on them.

A hook registered on a module is an attribute of it: it is pickled, copied and
exported with it, or keeps it from being. These hang on torch's global lists and
look up which module they are called for. While a region is compiled or traced
they do nothing, so that it is compiled as without them.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_module

Before = Callable[[torch.nn.Module, Any], None]
"""Called before a module's forward, with its positional arguments."""

After = Callable[[torch.nn.Module, Any, Any], None]
"""Called after it, with what it returned; None also if it raised."""


class Hooked(NamedTuple):
    """The functions called for one module."""

    module: weakref.ref[torch.nn.Module]
    before: Before
    after: After


class ModuleHooks:
    """The hooks of this process.

    Hooks that were added first are called first before a forward and last after
    it. Adding and removing while others remain leaves torch's lists alone: what
    is compiled is guarded by their lengths.
    """

    def __init__(self) -> None:
        self._hooked: dict[int, tuple[Hooked, ...]] = {}
        self._of_all: tuple[Before, ...] = ()
        self._installed = ExitStack()

    def add(self, module: torch.nn.Module, before: Before, after: After) -> Callable[[], None]:
        """Hook a module; call what is returned to undo it."""
        hooked = Hooked(weakref.ref(module), before, after)
        if not self._hooked and not self._of_all:
            self._install()
        # A module is held weakly, so its number may have been another's.
        others = tuple(other for other in self._hooked.get(id(module), ()) if other.module() is module)
        self._hooked[id(module)] = (*others, hooked)
        compiled = vars(module).get("_compiled_call_impl")
        if compiled is not None and not isinstance(compiled, _CompiledCall):
            module._compiled_call_impl = _CompiledCall(self, module, compiled)
        return partial(self._remove, id(module), hooked)

    def add_to_all(self, before: Before) -> Callable[[], None]:
        """Hook every module there is; call what is returned to undo it."""
        if not self._hooked and not self._of_all:
            self._install()
        self._of_all = (*self._of_all, before)

        def undo() -> None:
            self._of_all = tuple(other for other in self._of_all if other is not before)
            self._close_if_unused()

        return undo

    def _remove(self, key: int, hooked: Hooked) -> None:
        left = tuple(other for other in self._hooked.get(key, ()) if other is not hooked)
        self._hooked[key] = left
        if not left:
            del self._hooked[key]
            module = hooked.module()
            call = vars(module).get("_compiled_call_impl") if module is not None else None
            if module is not None and isinstance(call, _CompiledCall):
                module._compiled_call_impl = call.compiled
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._hooked and not self._of_all:
            self._installed.close()

    def _install(self) -> None:
        with ExitStack() as undo:
            undo.callback(torch_module.register_module_forward_pre_hook(self._before).remove)
            # always_call: a recompute that stops early leaves modules by exception.
            undo.callback(torch_module.register_module_forward_hook(self._after, always_call=True).remove)
            undo.callback(_without_warning("Using `torch.compile(module)` when there are global hooks"))
            self._installed = undo.pop_all()

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        if _is_written_down():
            return
        for before in self._of_all:
            before(module, args)
        for hooked in self._hooked.get(id(module), ()):
            if hooked.module() is module:
                hooked.before(module, args)

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if _is_written_down():
            return
        for hooked in reversed(self._hooked.get(id(module), ())):
            if hooked.module() is module:
                hooked.after(module, args, output)


class _CompiledCall:
    """The call of a module that was compiled in place, between its hooks.

    Its own hooks are inside of the compiled region, where they do nothing.
    Torch leaves this attribute out where a module is pickled or copied.
    """

    def __init__(self, hooks: ModuleHooks, module: torch.nn.Module, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled
        self._hooks, self._module = hooks, weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if module is None or _is_written_down():
            return self.compiled(*args, **kwargs)
        self._hooks._before(module, args)
        output = None
        try:
            output = self.compiled(*args, **kwargs)
        finally:
            self._hooks._after(module, args, output)
        return output


def _is_written_down() -> bool:
    """True if a forward pass is being compiled, exported or traced, rather than run."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _without_warning(message: str) -> Callable[[], None]:
    """Ignore a warning until what is returned is called."""
    warnings.filterwarnings("ignore", re.escape(message))
    added = warnings.filters[0]

    def undo() -> None:
        with contextlib.suppress(ValueError):
            warnings.filters.remove(added)  # type: ignore[attr-defined]

    return undo


def keyword_arguments() -> Mapping[str, Any]:
    """The keyword arguments that a module is being called with; for use in a hook before its forward.

    Global hooks are not given them: they are read from torch's frame that calls the hook.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == torch_module.__file__ or code is _CompiledCall.__call__.__code__:
            kwargs = frame.f_locals.get("kwargs")
            return kwargs if isinstance(kwargs, Mapping) else {}
        frame = frame.f_back
    return {}


module_hooks = ModuleHooks()
"""The hooks of all that is watched in this process."""
