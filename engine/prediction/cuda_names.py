"""`cuda` in somebody's own code means the GPU that is predicted for.

What a script puts on `cuda` goes to the modelled device, what it leaves on the
host stays there. So its functions are run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .assumptions import Assumptions
from .cuda_patches import replace
from .fake_cuda import DEVICE
from .gpus import Gpu

_READS = {
    torch.Tensor.item: None,
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__index__: int,
    torch.Tensor.__float__: float,
}
"""Functions that make a Python number of a tensor's value, and its type where the function says it."""


@contextmanager
def cuda_names(gpu: Gpu, assumptions: Assumptions) -> Iterator[None]:
    """Run somebody's code as if that GPU were here.

    Args:
        gpu: Which one.
        assumptions: Told of numbers that are read from tensors.
    """
    with ExitStack() as undo:
        for name, answer in _answers(gpu).items():
            if hasattr(torch.cuda, name):
                replace(undo, torch.cuda, name, answer)
        for kind in (torch.amp.autocast_mode.autocast, torch.amp.grad_scaler.GradScaler):
            replace(undo, kind, "__init__", _for_a_cpu(kind.__init__))
        replace(undo, torch, "compile", _uncompiled(assumptions))
        undo.enter_context(_CudaNames(assumptions))
        yield


def _answers(gpu: Gpu) -> dict[str, Callable[..., Any]]:
    """The answers of `torch.cuda` to questions about the device; its commands do nothing."""
    numbers = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "current_device")
    nothing = ("synchronize", "reset_peak_memory_stats", "set_device", "manual_seed", "manual_seed_all")
    return {
        **dict.fromkeys(numbers, lambda *_, **__: 0),
        **dict.fromkeys(nothing, lambda *_, **__: None),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *_, **__: gpu.capability >= (8, 0),
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *_: gpu.capability,
        "get_device_name": lambda *_: gpu.name,
    }


def _for_a_cpu(init: Callable[..., Any]) -> Callable[..., Any]:
    """autocast's and GradScaler's constructor with a CPU's name for the device, and a GPU's default dtype."""

    @wraps(init)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        name = "device_type" if "device_type" in init.__code__.co_varnames else "device"
        given = args[0] if args and isinstance(args[0], str) else kwargs.get(name, "cuda")
        if torch.device(given).type == "cuda":
            rest = args[1:] if args and isinstance(args[0], str) else args
            args, kwargs = (DEVICE.type, *rest), {key: value for key, value in kwargs.items() if key != name}
            if name == "device_type" and len(args) == 1 and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.get_autocast_dtype("cuda")
        init(self, *args, **kwargs)

    return call


def _uncompiled(assumptions: Assumptions) -> Callable[..., Any]:
    """`torch.compile` that leaves everything as it is written: what it compiles may hold less, or more."""

    def call(model: Any = None, **_: Any) -> Any:
        assumptions.say("what is compiled is predicted as it is written, uncompiled")
        return model if model is not None else lambda other: other

    return call


class _CudaNames(TorchFunctionMode):
    """Replaces devices among the arguments of PyTorch's functions."""

    def __init__(self, assumptions: Assumptions) -> None:
        super().__init__()
        self._assumptions = assumptions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0].to(DEVICE)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in _READS:
            value = func(*args, **kwargs)
            return self._assumptions.number(args[0], value, decides=_READS[func] is not None)
        named = func is torch.Tensor.to
        return func(
            *(_device(a, named) for a in args), **{k: _device(v, named or k == "device") for k, v in kwargs.items()}
        )


def _device(value: Any, named: bool) -> Any:
    """The modelled device instead of CUDA's.

    Args:
        value: An argument.
        named: Whether a text or a number would be a device's.
    """
    if isinstance(value, torch.device):
        return DEVICE if value.type == "cuda" else value
    if named and isinstance(value, str) and value.partition(":")[0] == "cuda":
        return DEVICE
    if named and isinstance(value, int) and not isinstance(value, bool):
        return DEVICE
    return value
