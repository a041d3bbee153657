"""Fake operators, answered from memory: a model's layers ask the same questions again and again.

What an operator returns on fake tensors follows from its arguments' shapes,
strides, dtypes and devices, from its plain arguments, and where it makes a
tensor of nothing from the default dtype. FakeTensorMode knows
that too; asking it costs ten times as much as running most operators.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

META = torch.device("meta")
_make_subclass: Any = torch.Tensor._make_subclass
"""As it is without what predictions of bitsandbytes put in its place, which leaves fake tensors alone."""
_PLAIN = (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Made(NamedTuple):
    """One tensor that an operator returns.

    Attributes:
        argument: Which tensor among the arguments it is or looks into; -1: a new one.
        same: Whether it is that very tensor.
    """

    argument: int
    same: bool
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = META
    state: dict[str, Any] | None = None


_Recipe = tuple[type | None, tuple[_Made | int | None, ...]]
"""The container of what is returned, if any, and its parts: tensors, numbers, nothing."""


class OpCache:
    """Results of operators by their arguments.

    Attributes:
        mode: Makes the fake tensors that it knows of; no others may be given to it.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, _Recipe | None] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator, or make what it would return."""
        if not func._schema.returns and func.namespace == "aten" and _known_by_shape_only(args):
            return None  # works in place on what there is: nothing comes of it here
        tensors: list[Any] = []
        parts: list[Any] = [func, torch.get_default_dtype()]
        if not _describe(args, parts, tensors) or (kwargs and not _describe_named(kwargs, parts, tensors)):
            return func(*args, **kwargs)
        key = tuple(parts)
        if key in self._known:
            recipe = self._known[key]
            return func(*args, **kwargs) if recipe is None else _make(recipe, tensors)
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        out = func(*args, **kwargs)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[key] = _recipe(out, tensors, storages, key)
        return out


@cache
def op_cache() -> OpCache:
    """This process's: the next prediction asks mostly what the last one did."""
    return OpCache()


REMEMBERED = 50_000
"""Answers, at about a kilobyte."""


def _known_by_shape_only(args: Any) -> bool:
    """True if the first tensor is one whose values are not followed, as those of host constants are."""
    first = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
    return isinstance(first, FakeTensor) and first.constant is None


def _describe(value: Any, parts: list[Any], tensors: list[Any]) -> bool:
    """Append what decides the result; False if that cannot be said."""
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            return False
        parts.append((value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device))
        tensors.append(value)
        return True
    if isinstance(value, list | tuple):
        parts.append(len(value))
        return all(_describe(part, parts, tensors) for part in value)
    if value is None:
        parts.append(None)
        return True
    if isinstance(value, _PLAIN):
        parts.append((type(value), value))
        return True
    return False


def _describe_named(kwargs: dict[str, Any], parts: list[Any], tensors: list[Any]) -> bool:
    for name, value in kwargs.items():
        parts.append(name)
        if not _describe(value, parts, tensors):
            return False
    return True


def _recipe(out: Any, tensors: list[Any], storages: list[int], key: Any) -> Any:
    """The recipe that makes the result again; None if it depends on more than the arguments' descriptions."""
    again: list[Any] = []
    for tensor in tensors:
        _describe(tensor, again, [])
    if again != [part for part in key if isinstance(part, tuple) and len(part) == 5]:
        return None  # it changed an argument's shape
    container = None if isinstance(out, torch.Tensor) or out is None else type(out)
    if container not in (None, tuple, list):
        return None
    made: list[_Made | int | None] = []
    for tensor in (out,) if container is None else out:
        if tensor is None or type(tensor) is int:
            made.append(tensor)
            continue
        if type(tensor) is not FakeTensor or tensor.constant is not None:
            same = next((i for i, t in enumerate(tensors) if t is tensor), None)
            if same is None:
                return None
            made.append(_Made(same, True))
            continue
        one = _one(tensor, tensors, storages)
        if one is None:
            return None
        made.append(one)
    return container, tuple(made)


def _one(tensor: FakeTensor, tensors: list[Any], storages: list[int]) -> _Made | None:
    for index, argument in enumerate(tensors):
        if argument is tensor:
            return _Made(index, True)
    storage = tensor.untyped_storage()
    shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    state = {name: value for name, value in vars(tensor).items() if name != "grad"}
    if storage._cdata in storages:
        return _Made(
            storages.index(storage._cdata), False, shape, stride, offset, tensor.dtype, tensor.fake_device, state
        )
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else -1
    if offset or storage.nbytes() != (last + 1) * tensor.element_size():
        return None
    return _Made(-1, False, shape, stride, 0, tensor.dtype, tensor.fake_device, state)


def _make(recipe: _Recipe, tensors: list[Any]) -> Any:
    container, made = recipe
    out = [
        (tensors[one.argument] if one.same else _tensor(one, tensors)) if type(one) is _Made else one for one in made
    ]
    return out[0] if container is None else container(out)


def _tensor(one: _Made, tensors: list[Any]) -> Any:
    assert one.state is not None
    with torch._C._DisableTorchDispatch():
        plain = torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device=META)
        if one.argument >= 0:
            plain.set_(tensors[one.argument].untyped_storage(), one.offset, one.shape, one.stride)
        tensor: Any = _make_subclass(FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=one.device)
    vars(tensor).update(one.state)
    return tensor
