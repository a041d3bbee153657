"""Fake operators, answered from memory: a model's layers ask the same questions again and again.

What an operator returns on fake tensors follows from its arguments' shapes,
strides, dtypes and devices, from its plain arguments, and where it makes a
tensor of nothing from the default dtype. FakeTensorMode knows
that too; asking it costs ten times as much as running most operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

META = torch.device("meta")
_make_subclass: Any = torch.Tensor._make_subclass
"""As it is without what predictions of bitsandbytes put in its place, which leaves fake tensors alone."""
_PLAIN = (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
_PLAIN_TYPES = frozenset(_PLAIN)

_Maker = Callable[[list[Any]], Any]
"""Makes one part of a result from the tensors among the arguments."""
_Recipe = tuple[type | None, tuple[_Maker, ...]]
"""The container of what is returned, if any, and its parts: tensors, numbers, nothing."""


class _Operator:
    """One operator, and its results by the descriptions of its arguments; None: they depend on more.

    Attributes:
        func: Held, so that its number is no other's.
        returns_nothing: It works in place on what there is.
    """

    __slots__ = ("func", "recipes", "returns_nothing")

    def __init__(self, func: Any) -> None:
        self.func = func
        self.recipes: dict[Any, _Recipe | None] = {}
        self.returns_nothing = not func._schema.returns and func.namespace == "aten"


class OpCache:
    """Results of operators by their arguments.

    Attributes:
        mode: Makes the fake tensors that it knows of; no others may be given to it.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # it would remember what is remembered here
        self._operators: dict[int, _Operator] = {}  # by id: operators hash slowly
        self._remembered = 0
        self._lifted: dict[Any, tuple[_Maker, bool]] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator, or make what it would return."""
        operator = self._operators.get(id(func))
        if operator is None:
            operator = self._operators[id(func)] = _Operator(func)
        if operator.returns_nothing and _known_by_shape_only(args):
            return None
        tensors: list[Any] = []
        parts: list[Any] = [torch.get_default_dtype()]
        if not _describe(args, parts, tensors) or (kwargs and not _describe_named(kwargs, parts, tensors)):
            return func(*args, **kwargs)
        key = tuple(parts)
        recipe = operator.recipes.get(key, _NEVER_ASKED)
        if recipe is _NEVER_ASKED:
            before = [(_description(tensor), tensor.untyped_storage()._cdata) for tensor in tensors]
            out = func(*args, **kwargs)
            self._remember(operator, key, _recipe(out, tensors, before))
            return out
        if recipe is None:
            return func(*args, **kwargs)
        container, makers = recipe
        with torch._C._DisableTorchDispatch():
            if container is None:
                return makers[0](tensors)
            return container([make(tensors) for make in makers])

    def lifted(self, lift: Any, made: torch.Tensor) -> Any:
        """The fake tensor of what `torch.tensor` has made: one of a single element knows its value.

        Args:
            lift: The operator that would make it.
            made: Contiguous, on the host, and no fake tensor.
        """
        key = made.shape, made.dtype
        if key not in self._lifted:
            out = lift(made)
            self._lifted[key] = _new(_description(out), _state(out) | {"constant": None}), out.constant is not None
            return out
        make, known = self._lifted[key]
        with torch._C._DisableTorchDispatch():
            out = make([])
            if known:
                out.constant = made.clone()
        if known:
            self.mode.fake_tensor_converter.add_constant_storage_mapping(out)
        return out

    def _remember(self, operator: _Operator, key: Any, recipe: _Recipe | None) -> None:
        if self._remembered >= REMEMBERED:
            self._operators.clear()
            self._remembered = 0
        self._remembered += 1
        operator.recipes[key] = recipe


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


_NEVER_ASKED: Any = object()


def _description(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset(), tensor.fake_device


def _describe(values: Iterable[Any], parts: list[Any], tensors: list[Any]) -> bool:
    """Append what decides the result; False if that cannot be said."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None:
                return False
            parts.append(_description(value))
            tensors.append(value)
        elif isinstance(value, list | tuple):
            types = tuple(map(type, value))
            if _PLAIN_TYPES.issuperset(types):
                parts.append((types, tuple(value)))
                continue
            parts.append(len(value))
            if not _describe(value, parts, tensors):
                return False
        elif value is None:
            parts.append(None)
        elif isinstance(value, _PLAIN):
            parts.append((type(value), value))
        elif isinstance(value, torch.Generator):
            parts.append(torch.Generator)  # what it draws has no shape
        else:
            return False
    return True


def _describe_named(kwargs: dict[str, Any], parts: list[Any], tensors: list[Any]) -> bool:
    parts.extend(kwargs)
    return _describe(kwargs.values(), parts, tensors)


def _recipe(out: Any, tensors: list[Any], before: list[tuple[Any, int]]) -> _Recipe | None:
    """The recipe that makes the result again; None if it depends on more than the arguments' descriptions.

    Args:
        out: The result.
        tensors: The arguments.
        before: Their descriptions and storages, as they were before the operator ran.
    """
    if any(_description(tensor) != described for tensor, (described, _) in zip(tensors, before, strict=True)):
        return None  # it changed an argument's shape
    container = None if isinstance(out, torch.Tensor) or out is None else type(out)
    if container not in (None, tuple, list):
        return None
    makers = []
    for part in (out,) if container is None else out:
        maker = _maker(part, tensors, before)
        if maker is None:
            return None
        makers.append(maker)
    return container, tuple(makers)


def _maker(out: Any, tensors: list[Any], before: list[tuple[Any, int]]) -> _Maker | None:
    """Makes a part of the result again; None if it cannot be said how."""
    if out is None or type(out) is int:
        return lambda _: out
    for index, argument in enumerate(tensors):
        if argument is out:
            return itemgetter(index)
    if type(out) is not FakeTensor or out.constant is not None:
        return None
    state = _state(out)
    storage, described = out.untyped_storage(), _description(out)
    for index, (argument, address) in enumerate(before):
        if address == storage._cdata:
            return _same_again(index, described, state) if argument == described else _view(index, described, state)
    shape, stride, _, offset, _ = described
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else -1
    if offset or storage.nbytes() != (last + 1) * out.element_size():
        return None
    return _new(described, state)


def _state(tensor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(tensor).items() if name != "grad"}


def _new(described: tuple[Any, ...], state: dict[str, Any]) -> _Maker:
    """Makes a tensor of a storage of its own."""
    shape, stride, dtype, _, device = described

    def make(_tensors: list[Any]) -> Any:
        return _fake(torch.empty_strided(shape, stride, dtype=dtype, device=META), device, state)

    return make


def _view(index: int, described: tuple[Any, ...], state: dict[str, Any]) -> _Maker:
    """Makes a tensor that looks into an argument's storage."""
    shape, stride, dtype, offset, device = described

    def make(tensors: list[Any]) -> Any:
        plain = torch.empty_strided(shape, stride, dtype=dtype, device=META)
        plain.set_(tensors[index].untyped_storage(), offset, shape, stride)
        return _fake(plain, device, state)

    return make


def _same_again(index: int, described: tuple[Any, ...], state: dict[str, Any]) -> _Maker:
    """Makes another tensor that looks at the very elements that an argument looks at."""
    device = described[-1]
    return lambda tensors: _fake(tensors[index], device, state)


def _fake(tensor: Any, device: torch.device, state: dict[str, Any]) -> Any:
    """A fake tensor that shares a tensor's storage."""
    fake: Any = _make_subclass(FakeTensor, tensor, False, dispatch_device=True, device_for_backend_keys=device)
    vars(fake).update(state)
    return fake
