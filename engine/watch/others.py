"""Models and optimizers beside those that are watched: a frozen reference, a teacher, an average, a discriminator.

Nobody hands them to us, so they are looked for among all objects that are
alive. That takes about 100 ms, spent when a run begins and where tensors have
come up that nobody owns.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count
from typing import Any, NamedTuple

import torch

from ..module_names import OTHER_MODEL


class Others(NamedTuple):
    """Models and optimizers found in the process.

    Attributes:
        models: Outermost modules with tensors of their own, each with what the names of its tensors begin with.
        optimizers: Of any parameters.
        compiled: What `torch.compile(model)` returned: called instead of the model.
        scalers: Those that scale a loss.
    """

    models: list[tuple[str, torch.nn.Module]]
    optimizers: list[torch.optim.Optimizer]
    compiled: list[torch.nn.Module]
    scalers: list[torch.amp.GradScaler]


def find_others(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Others:
    """All models and optimizers alive but these."""
    alive = _alive((torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler))
    modules = [thing for thing in alive if isinstance(thing, torch.nn.Module)]
    inside = {id(child) for module in modules for child in module._modules.values()}
    watched = {id(module) for module in model.modules()}
    known = {id(tensor) for tensor in _tensors(model)}
    roots = [module for module in modules if id(module) not in inside | watched]
    models = [root for root in roots if any(id(tensor) not in known for tensor in _tensors(root))]
    known_optimizers = set(map(id, optimizers))
    return Others(
        [(f"{name}{OTHER_MODEL}", other) for name, other in zip(_names(models), models, strict=True)],
        [o for o in alive if isinstance(o, torch.optim.Optimizer) and id(o) not in known_optimizers],
        [root for root in roots if root._modules.get("_orig_mod") is model],
        [s for s in alive if isinstance(s, torch.amp.GradScaler) and s.is_enabled() and s._scale is not None],
    )


def compiled_modules(model: torch.nn.Module) -> int:
    """Number of a model's modules that are compiled."""
    compiled = ("_orig_mod" in module._modules or "_compiled_call_impl" in vars(module) for module in model.modules())
    return sum(compiled)


def _alive(kinds: tuple[type[Any], ...]) -> list[Any]:
    # By type alone: `isinstance` asks an object for its class, and a proxy may answer by loading something.
    objects = gc.get_objects()
    types = list(map(type, objects))
    wanted = {each for each in set(types) if issubclass(each, kinds)}
    return list(compress(objects, map(wanted.__contains__, types)))


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _names(models: Sequence[torch.nn.Module]) -> Iterator[str]:
    """Names of models, where a global variable or an attribute holds them; otherwise their classes."""
    held: dict[int, str] = {}
    wanted = set(map(id, models))
    for holder in gc.get_referrers(*models) if models else ():
        for key, value in _namespace(holder):
            if id(value) in wanted and _better(key, held.get(id(value))):
                held[id(value)] = key
    taken: set[str] = set()
    for model in models:
        name = held.get(id(model), type(model).__name__)
        unique = next(each for n in count(1) if (each := name if n == 1 else f"{name} {n}") not in taken)
        taken.add(unique)
        yield unique


def _namespace(holder: Any) -> Iterable[tuple[Any, Any]]:
    """The variables of a module or the attributes of an object; nothing of what is neither."""
    if type(holder) is not dict and type(holder).__dictoffset__:
        holder = object.__getattribute__(holder, "__dict__")
    # A copy: another thread may add to it while we look.
    return list(holder.items()) if type(holder) is dict else ()


def _better(key: Any, known: str | None) -> bool:
    """Public names before private ones, then in the alphabet's order, so that a run gets the same names again."""
    if type(key) is not str or not key.isidentifier():
        return False
    return known is None or (key.startswith("_"), key) < (known.startswith("_"), known)
