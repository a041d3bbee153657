"""Watching a script that has not been edited: its model and optimizer are found when they are first used.

`gpumem-tui exec -- COMMAND` puts `autoload/` first on the Python path of the
command; the `sitecustomize` there calls `wait_for_torch` in every Python
process it starts. Nothing happens in one that makes no optimizer.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from .. import nccl
from ..config import kind_and_line
from .exec_report import note_watched, tell_at_exit

OPTIMIZERS = "torch.optim.optimizer"
PARALLEL = "torch.nn.parallel.distributed"
DEEPSPEED = "deepspeed.runtime.engine"


class _Waiting:
    """Finds a module like anybody, and looks in when it has been loaded.

    Args:
        name: Of the module.
        then: Is given it.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Only that one, and only once."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec is not None else None
        if loader is None:
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self._then(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def wait_for_torch() -> None:
    """Look for optimizers, and for NCCL, as soon as torch is imported, if it ever is."""
    tell_at_exit()
    sys.meta_path[:0] = [_Waiting(OPTIMIZERS, note_optimizers), _Waiting(PARALLEL, lambda _: nccl.observe())]


def note_optimizers(module: Any) -> None:
    """Have every optimizer noted when it is made; the first forward of its model begins the watching."""
    optimizer_class = module.Optimizer
    make = optimizer_class.__init__
    finder = Finder()

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        finder.made(self)

    init.__wrapped__ = make  # type: ignore[attr-defined]
    init.__doc__ = make.__doc__
    optimizer_class.__init__ = init


class Finder:
    """Joins the optimizers of a model with the outermost module that has all of their parameters."""

    def __init__(self) -> None:
        self._optimizers: list[weakref.ref[Any]] = []
        self._undo: Any = None
        self._tried: set[int] = set()
        self._found: Any = None
        self._over = False

    def made(self, optimizer: Any) -> None:
        """An optimizer has been made; wrappers around one have no parameters of their own yet."""
        if self._over or not getattr(optimizer, "param_groups", None):
            return
        try:
            self._optimizers.append(weakref.ref(optimizer))
            self._tried.clear()
            if self._undo is None:
                from ..tracing.module_hooks import module_hooks

                self._undo = module_hooks.add_to_all(self._forward)
        except Exception as error:
            self._give_up(error)

    def _forward(self, module: Any, args: Any) -> None:
        import torch

        if not torch.is_grad_enabled() or id(module) in self._tried or self._over:
            return
        if _watches_itself():
            self._stop()
            return
        try:
            self._tried.add(id(module))
            optimizers = self._optimizers_of(module)
            if optimizers:
                self._begin(module, optimizers, args)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """The script is left alone, with one line that says so."""
        note_watched()
        with contextlib.suppress(Exception):
            sys.stderr.write(f"gpumem-tui: not watched, the run goes on: {kind_and_line(error)}\n")
        self._stop()

    def _optimizers_of(self, module: Any) -> list[Any]:
        """Optimizers whose parameters are all the module's; DeepSpeed's engine has one, over float32 copies of them."""
        if type(module).__module__ == DEEPSPEED:
            return [module.optimizer] if module.optimizer is not None else []
        own = {id(parameter) for parameter in module.parameters()}
        optimizers = [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]
        return [o for o in optimizers if all(id(p) in own for group in o.param_groups for p in group["params"])]

    def _begin(self, module: Any, optimizers: list[Any], args: Any) -> None:
        from .watcher import watch

        self._found = watch(module, optimizers)
        self._found.begin(module, args)
        self._stop()

    def _stop(self) -> None:
        self._over = True
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._optimizers.clear()
        self._tried.clear()


def _watches_itself() -> bool:
    """True if the script has begun a watch of its own: a second one would show the same again."""
    watcher = sys.modules.get(f"{__package__}.watcher")
    return watcher is not None and watcher.watch.begun
