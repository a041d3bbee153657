"""Hooks on modules that leave no trace on them.

A hook registered on a module is an attribute of it: it is pickled, copied and
exported with it, or keeps it from being. These look up which module they are
called for: `module_hooks` hang on torch's global lists, `call_hooks` on the classes
of the few modules that they are for. While a region is compiled or traced they do
nothing, so that it is compiled as without them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
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


class _Registry:
    """The functions called for each hooked module.

    Those that were added first are called first before a forward and last after it.
    """

    def __init__(self) -> None:
        self._hooked: dict[int, tuple[Hooked, ...]] = {}

    def _put(self, hooked: Hooked) -> None:
        module = hooked.module()
        # A module is held weakly, so its number may have been another's.
        others = tuple(other for other in self._hooked.get(id(module), ()) if other.module() is module)
        self._hooked[id(module)] = (*others, hooked)

    def _take(self, key: int, hooked: Hooked) -> bool:
        """Take one away again; returns whether it was the module's last."""
        self._hooked[key] = tuple(other for other in self._hooked.get(key, ()) if other is not hooked)
        if self._hooked[key]:
            return False
        del self._hooked[key]
        return True

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        for hooked in self._hooked.get(id(module), ()):
            if hooked.module() is module:
                hooked.before(module, args)

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        for hooked in reversed(self._hooked.get(id(module), ())):
            if hooked.module() is module:
                hooked.after(module, args, output)

    def _around(self, call: Callable[..., Any], module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module between its hooks; `keyword_arguments` looks for this frame."""
        self._before(module, args)
        output = None
        try:
            output = call(*args, **kwargs)
        finally:
            self._after(module, args, output)
        return output


class ModuleHooks(_Registry):
    """The hooks on any modules of this process: each module's call takes torch's slow path, about 5 us longer.

    Adding and removing while others remain leaves torch's lists alone: what
    is compiled is guarded by their lengths.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of_all: tuple[Before, ...] = ()
        self._installed, self._is_installed = ExitStack(), False
        self._keepers = 0

    def add(self, module: torch.nn.Module, before: Before, after: After) -> Callable[[], None]:
        """Hook a module; call what is returned to undo it."""
        hooked = Hooked(weakref.ref(module), before, after)
        self._install()
        self._put(hooked)
        compiled = vars(module).get("_compiled_call_impl")
        if compiled is not None and not isinstance(compiled, _CompiledCall):
            module._compiled_call_impl = _CompiledCall(self, module, compiled)
        return partial(self._remove, id(module), hooked)

    def add_to_all(self, before: Before) -> Callable[[], None]:
        """Hook every module there is; call what is returned to undo it."""
        self._install()
        self._of_all = (*self._of_all, before)

        def undo() -> None:
            self._of_all = tuple(other for other in self._of_all if other is not before)
            self._close_if_unused()

        return undo

    @contextlib.contextmanager
    def kept_for_compiled(self) -> Iterator[None]:
        """While this lasts, torch's lists stay as they are once anything is compiled, also when no hook is left.

        What has been compiled would be compiled again with every change.
        """
        self._keepers += 1
        try:
            yield
        finally:
            self._keepers -= 1
            self._close_if_unused()

    def _remove(self, key: int, hooked: Hooked) -> None:
        if self._take(key, hooked):
            module = hooked.module()
            call = vars(module).get("_compiled_call_impl") if module is not None else None
            if module is not None and isinstance(call, _CompiledCall):
                module._compiled_call_impl = call.compiled
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._hooked and not self._of_all and not (self._keepers and _something_is_compiled()):
            self._installed.close()

    def _install(self) -> None:
        if self._is_installed:
            return
        with ExitStack() as undo:
            undo.callback(torch_module.register_module_forward_pre_hook(self._global_before).remove)
            # always_call: a recompute that stops early leaves modules by exception.
            undo.callback(torch_module.register_module_forward_hook(self._global_after, always_call=True).remove)
            undo.callback(_without_warning("Using `torch.compile(module)` when there are global hooks"))
            undo.callback(setattr, self, "_is_installed", False)
            self._installed, self._is_installed = undo.pop_all(), True

    # Every module of a traced step comes through these two: they call no more than they have to.

    def _global_before(self, module: torch.nn.Module, args: Any) -> None:
        if _is_compiling() or _is_tracing():
            return
        for before in self._of_all:
            before(module, args)
        for hooked in self._hooked.get(id(module), ()):
            if hooked.module() is module:
                hooked.before(module, args)

    def _global_after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if _is_compiling() or _is_tracing():
            return
        for hooked in self._hooked.get(id(module), ())[::-1]:
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
        return self._hooks._around(self.compiled, module, args, kwargs)


class CallHooks(_Registry):
    """Hooks around the calls of a few modules, at no cost to the modules inside of them.

    They stand around whatever the module's class does when it is called, hooks of
    the module's own included.
    """

    def __init__(self) -> None:
        super().__init__()
        self._classes: dict[type, tuple[int, Callable[[], None]]] = {}

    def add(self, module: torch.nn.Module, before: Before, after: After) -> Callable[[], None]:
        """Hook a module; call what is returned to undo it."""
        hooked = Hooked(weakref.ref(module), before, after)
        kind = type(module)
        users, undo = self._classes.get(kind) or (0, self._wrap(kind))
        self._classes[kind] = users + 1, undo
        self._put(hooked)
        return partial(self._remove, kind, id(module), hooked)

    def _remove(self, kind: type, key: int, hooked: Hooked) -> None:
        self._take(key, hooked)
        users, undo = self._classes.pop(kind)
        if users > 1:
            self._classes[kind] = users - 1, undo
        else:
            undo()

    def _wrap(self, kind: type) -> Callable[[], None]:
        """Give a class another `__call__`; returns what takes it away, unless somebody else has replaced it."""
        own, call = vars(kind).get("__call__"), kind.__call__

        @functools.wraps(call)
        def hooked_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if _is_written_down() or id(module) not in self._hooked:
                return call(module, *args, **kwargs)
            return self._around(partial(call, module), module, args, kwargs)

        def undo() -> None:
            if vars(kind).get("__call__") is not hooked_call:
                return
            if own is not None:
                kind.__call__ = own  # type: ignore[method-assign]
            else:
                del kind.__call__

        kind.__call__ = hooked_call  # type: ignore[method-assign]
        return undo


_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing


def _is_written_down() -> bool:
    """True if a forward pass is being compiled, exported or traced, rather than run."""
    return _is_compiling() or _is_tracing()


def _something_is_compiled() -> bool:
    """True if torch's compiler has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])


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
        if code.co_filename == torch_module.__file__ or code is _Registry._around.__code__:
            kwargs = frame.f_locals.get("kwargs")
            return kwargs if isinstance(kwargs, Mapping) else {}
        frame = frame.f_back
    return {}


module_hooks = ModuleHooks()
"""The hooks of all that is watched in this process."""

call_hooks = CallHooks()
"""The hooks around whole models, which stay while their steps are not traced."""
