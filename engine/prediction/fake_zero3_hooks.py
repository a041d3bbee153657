"""Hooks that tell ZeRO stage 3 of every module that computes, forwards and backwards, and the linear it brings.

(deepspeed/runtime/zero/parameter_offload.py, linear.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .fake_coordinator import Coordinator
from .fake_partitions import Partition, Status, gather_now

Hook = Callable[[], None]


class Parameters(Protocol):
    """The parameters of a model, partitioned."""

    partitions: dict[int, Partition]
    coordinator: Coordinator

    def uses(self, module: torch.nn.Module, partition: Partition) -> None:
        """A module has been seen to use another's parameter."""


class ModuleHooks:
    """Tells a coordinator of every module that computes, forwards and backwards.

    Args:
        model: All of whose modules are hooked.
        optimizer: Whose parameters they use.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Parameters) -> None:
        self._optimizer, self._coordinator = optimizer, optimizer.coordinator
        self._at_work = [model]
        self._is_forward = False
        self._waiting: dict[int, int] = {}
        self._ahead: dict[int, int] = {}
        self._handles = [model.register_forward_pre_hook(lambda *_: self._coordinator.begin())]
        for module in model.modules():
            module._parameters = _Parameters(module._parameters, self._used_elsewhere)
            self._handles += (
                module.register_forward_pre_hook(self._before_forward),
                module.register_forward_hook(self._after_forward),
            )

    def remove(self) -> None:
        """Undo all of it."""
        for handle in self._handles:
            handle.remove()
        for module in self._at_work[0].modules():
            module._parameters = dict(module._parameters)

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """The context of a forward pass, in which a parameter that a module takes from another is gathered."""
        self._is_forward = True
        try:
            yield
        finally:
            self._is_forward = False

    def _used_elsewhere(self, parameter: Any) -> None:
        partition = self._optimizer.partitions.get(id(parameter))
        if self._is_forward and partition is not None and partition.status is Status.PARTITIONED:
            self._optimizer.uses(self._at_work[-1], partition)
            gather_now([partition])

    def _before_forward(self, module: torch.nn.Module, inputs: Any) -> Any:
        self._at_work.append(module)
        with torch.no_grad():
            self._coordinator.fetch(module, forward=True)
        key = id(module)
        self._waiting[key] = 0

        def seen(tensor: torch.Tensor) -> None:
            self._waiting[key] += tensor.requires_grad

        def after_backward() -> None:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                with torch.no_grad():
                    self._coordinator.release(module, forward=False)

        return _through(inputs, seen, after_backward)

    def _after_forward(self, module: torch.nn.Module, _inputs: Any, outputs: Any) -> Any:
        self._at_work.pop()
        with torch.no_grad():
            self._coordinator.release(module, forward=True)
        key = id(module)

        def seen(_tensor: torch.Tensor) -> None:
            self._ahead[key] = self._ahead.get(key, 0) + 1

        def before_backward() -> None:
            if self._ahead[key] > 0:
                self._ahead[key] -= 1
                with torch.no_grad():
                    self._coordinator.fetch(module, forward=False)

        return _through(outputs, seen, before_backward)


class _Parameters(dict[str, Any]):
    """A module's parameters; whoever takes one is seen to.

    Args:
        parameters: By name.
        used: Told of each that is taken.
    """

    def __init__(self, parameters: Mapping[str, Any], used: Callable[[Any], None]) -> None:
        super().__init__(parameters)
        self._used = used

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        self._used(parameter)
        return parameter


class _Passage(torch.autograd.Function):
    """The identity, before or behind a module: its backward sees that a gradient has come there."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, passed: Hook) -> torch.Tensor:
        ctx.passed = passed
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        ctx.passed()
        return gradient, None


def _through(value: Any, seen: Callable[[torch.Tensor], None], passed: Hook) -> Any:
    """Have each tensor of a module's inputs or outputs pass through, dictionaries in place."""
    if isinstance(value, torch.Tensor):
        seen(value)
        return _Passage.apply(value, passed)  # type: ignore[no-untyped-call]
    if isinstance(value, tuple | list):
        each = [_through(one, seen, passed) for one in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    if isinstance(value, dict):
        for key in value:
            value[key] = _through(value[key], seen, passed)
    return value


class _Linear(torch.autograd.Function):
    """DeepSpeed's linear, which keeps input and weight."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        ctx.save_for_backward(given, weight, bias)
        if given.dim() == 2 and bias is not None:
            return torch.addmm(bias, given, weight.t())
        output = given.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        given, weight, bias = ctx.saved_tensors
        of_given = of_weight = of_bias = None
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            of_given = gradient.matmul(weight)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t().matmul(given.reshape(-1, given.shape[-1]))
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = gradient.sum([*range(gradient.dim() - 1)])
        return of_given, of_weight, of_bias


def linear(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """Stands in for torch's, which stage 3 replaces. Arguments as there."""
    return _Linear.apply(given, weight, bias)  # type: ignore[no-untyped-call]
