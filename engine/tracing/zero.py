"""DeepSpeed's ZeRO: partitions, float32 master weights and buffers, which lie on its optimizers by name.

A ZeRO optimizer stands around one of torch's, whose parameters are the master
weights. What lives within a backward is noted where DeepSpeed makes it: its
functions are wrapped while somebody listens.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..categories import Category
from ..module_names import strip_wrappers
from .owners import Owned, tensors_in
from .wrapped_functions import WrappedFunctions, wrap

RUNTIME = "deepspeed.runtime"

MASTERS = "master_weights"
PARTITIONS = ("bit16_groups_flat", "fp16_partitioned_groups_flat", "bf16_groups_flat", "fp16_groups_flat")
MASTER_WEIGHTS = (
    "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "fp32_groups_flat",
)  # fmt: skip
GRADIENTS = (
    "averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
)  # fmt: skip
STAGING = ("temp_grad_buffer_for_gpu_offload",)
SCALARS = ("_global_grad_norm", "inf_or_nan_tracker", "norm_for_param_grads")
"""Attributes in which its optimizers of all stages hold tensors."""

Note = Callable[[Iterable[Owned]], None]
Find = Callable[..., Iterator[Owned]]

_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
_names = WeakTensorKeyDictionary()


def optimizer_in(optimizer: Any) -> Any:
    """The ZeRO optimizer among an optimizer and those that it stands around, known from here on; None: there is none.

    Args:
        optimizer: Of torch's, of DeepSpeed's, a wrapper of accelerate's; or DeepSpeed's engine.
    """
    while optimizer is not None:
        if isinstance(getattr(optimizer, "ipg_buckets", None), dict) or _masters(optimizer):
            _optimizers.add(optimizer)
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def around(optimizer: torch.optim.Optimizer | None) -> Any:
    """The ZeRO optimizer that stands around one of torch's; None: there is none."""
    return next((zero for zero in list(_optimizers) if zero.optimizer is optimizer), None)


@contextmanager
def steps_hooked(
    optimizer: torch.optim.Optimizer, begins: Callable[..., None], ends: Callable[..., None]
) -> Iterator[None]:
    """Call two functions with an optimizer before and after each of its steps, until the context is left.

    Inside of a ZeRO optimizer it steps once for every group of parameters: then they are called around all of these.
    """
    zero = around(optimizer)
    with ExitStack() as undo:
        if zero is not None:
            wrap(undo, zero, "step", lambda *_, **__: begins(optimizer), lambda *_, **__: ends(optimizer))
        else:
            undo.callback(optimizer.register_step_pre_hook(begins).remove)
            undo.callback(optimizer.register_step_post_hook(ends).remove)
        yield


@contextmanager
def observed(model: torch.nn.Module, note: Note) -> Iterator[None]:
    """Tell of every gather and every reduction of ZeRO's, until the context is left.

    Args:
        model: Whose parameters' names are used.
        note: Told on the thread that gathers or reduces: in backward on a GPU, autograd's own.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            _names[parameter] = strip_wrappers(name)
    with _zero.heard_by(note):
        yield


def is_partitioned(parameter: torch.Tensor) -> bool:
    """True for a parameter of stage 3: what it holds is its partition, and all of it only while it is gathered."""
    return getattr(parameter, "ds_tensor", None) is not None


def at_rest() -> Iterator[Owned]:
    """Tensors that stay where they are from step to step."""
    yield from ((Category.OPTIMIZER_STATE, name, tensor) for name, tensor in master_weights())
    for optimizer in list(_optimizers):
        yield from _held(optimizer, Category.PARAMETERS, PARTITIONS)
        for parameter in _parameters(optimizer):
            if is_partitioned(parameter):
                yield Category.PARAMETERS, _name(parameter), parameter.ds_tensor


def for_now() -> Iterator[Owned]:
    """Gradients wherever they are kept, buffers that are there, parameters that are gathered."""
    for optimizer in list(_optimizers):
        yield from _gradients(optimizer)
        yield from _buckets(optimizer)
        yield from gathered(_parameters(optimizer))
        yield from _held(optimizer, Category.OPTIMIZER_STATE, SCALARS)


def master_weights() -> Iterator[tuple[str, torch.Tensor]]:
    """The float32 copies that the optimizer inside updates."""
    for optimizer in list(_optimizers):
        yield from ((f"{MASTERS}.{index}", tensor) for index, tensor in enumerate(_masters(optimizer)))


# --- what it holds --------------------------------------------------------------------


def _masters(optimizer: Any) -> list[torch.Tensor]:
    return [tensor for name in MASTER_WEIGHTS for _, tensor in tensors_in(getattr(optimizer, name, None))]


def _held(optimizer: Any, category: Category, names: tuple[str, ...]) -> Iterator[Owned]:
    for name in names:
        for part, tensor in tensors_in(getattr(optimizer, name, None), name):
            yield category, part, tensor


def _gradients(optimizer: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    yield from _held(optimizer, Category.GRADIENTS, GRADIENTS)
    for index, tensor in enumerate(_masters(optimizer)):
        if tensor.grad is not None:
            yield Category.GRADIENTS, f"{MASTERS}.{index}.grad", tensor.grad
    for parameter in _parameters(optimizer):
        for gradient in (parameter.grad, getattr(parameter, "grad_accum", None)):
            if gradient is not None:
                yield Category.GRADIENTS, f"{_name(parameter)}.grad", gradient


def _buckets(optimizer: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """The ipg buffers: gradients that independent parameters have are copied there to be reduced."""
    for dtype, bucket in (getattr(optimizer, "ipg_buckets", None) or {}).items():
        for _part, tensor in tensors_in(bucket.buffer):
            yield Category.COMMUNICATION, f"ipg_buckets.{str(dtype).removeprefix('torch.')}", tensor
    yield from _held(optimizer, Category.COMMUNICATION, STAGING)


def _parameters(optimizer: Any) -> Iterator[Any]:
    """Parameters of the model, in 16 bit: those that it updates, and in stage 3 all others, which it partitions too."""
    for name in ("bit16_groups", "fp16_groups", "bf16_groups"):
        for group in getattr(optimizer, name, None) or ():
            yield from group
    if (model := getattr(optimizer, "module", None)) is not None:
        yield from (p for p in model.parameters() if is_partitioned(p) and not p.requires_grad)


def gathered(parameters: Iterable[Any]) -> Iterator[Owned]:
    """Those of stage 3 that are there whole at the moment."""
    for parameter in parameters:
        if is_partitioned(parameter) and parameter.numel():
            yield Category.GATHERED, _name(parameter), parameter


def _name(parameter: torch.Tensor) -> str:
    return str(_names.get(parameter, "parameters"))


# --- where it makes it ----------------------------------------------------------------


def _wrap_all(undo: ExitStack) -> None:
    if (stage_2 := sys.modules.get(f"{RUNTIME}.zero.stage_1_and_2")) is not None:
        optimizer = stage_2.DeepSpeedZeroOptimizer
        wrap(undo, optimizer, "setup_buckets", after=_afterwards(_buckets))
        wrap(undo, optimizer, "reduce_independent_p_g_buckets_and_remove_grads", before=partial(_tell, gradient_of))
        for method in ("reduce_ipg_grads", "independent_gradient_partition_epilogue"):
            wrap(undo, optimizer, method, after=_afterwards(_gradients))
        wrap(undo, optimizer, "_optimizer_step", before=partial(_tell, _gradients))
    if (stage_3 := sys.modules.get(f"{RUNTIME}.zero.stage3")) is not None:
        optimizer = stage_3.DeepSpeedZeroOptimizer_Stage3
        wrap(undo, optimizer, "reduce_independent_p_g_buckets_and_remove_grads", before=partial(_tell, gradient_of))
        wrap(undo, optimizer, "independent_gradient_partition_epilogue", after=_afterwards(_gradients))
        wrap(undo, optimizer, "_optimizer_step", before=partial(_tell, _gradients))
    if (gathering := sys.modules.get(f"{RUNTIME}.zero.partition_parameters")) is not None:
        for handle in (gathering.AllGatherHandle, gathering.AllGatherCoalescedHandle):
            wrap(undo, handle, "__init__", after=_afterwards(_gather_begun))
            wrap(undo, handle, "wait", after=_afterwards(_gather_ended))
        for handle in (gathering.NoGatherHandle, gathering.NoGatherCoalescedHandle):  # of a rank that is alone
            wrap(undo, handle, "wait", after=_afterwards(_gather_ended))


_zero: WrappedFunctions[Note] = WrappedFunctions(_wrap_all)


def _tell(find: Find, *args: Any, **kwargs: Any) -> None:
    for note in _zero.listeners:
        note(find(*args, **kwargs))


def _afterwards(find: Find) -> Callable[..., None]:
    return lambda _result, *args, **kwargs: _tell(find, *args, **kwargs)


def gradient_of(optimizer: Any, parameter: torch.Tensor, *_: Any, **__: Any) -> Iterator[Owned]:
    """A gradient, before it is copied into a bucket and given up."""
    optimizer_in(optimizer)
    if parameter.grad is not None:
        yield Category.GRADIENTS, f"{_name(parameter)}.grad", parameter.grad


def _gather_begun(handle: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """The outputs of an all-gather under way, of which the parameters are made or are views."""
    for _part, tensor in tensors_in(vars(handle)):
        yield Category.GATHERED, "all_gather_output", tensor


def _gather_ended(handle: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """The parameters that have been gathered: each a part of the output, or made of such parts."""
    yield from gathered(tensor for _part, tensor in tensors_in(vars(handle)))
