"""Parameters sharded over ranks: what FSDP gathers and reduces, noted where it does so.

Both of torch's versions keep unsharded parameters in storages that they resize,
which no operator shows, and copy gradients into buffers that live for a layer.
Their methods are wrapped while somebody listens, and are what they were afterwards.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ..categories import Category
from ..module_names import strip_wrappers
from .owners import Owned
from .wrapped_functions import WrappedFunctions, wrap

FULLY_SHARD = "torch.distributed.fsdp._fully_shard"
FSDP1 = "torch.distributed.fsdp"

Note = Callable[[Iterable[Owned]], None]
"""Told of tensors whose storages have just been filled, or emptied."""

Find = Callable[..., Iterator[Owned]]

_groups: weakref.WeakSet[Any] = weakref.WeakSet()
_handles: weakref.WeakSet[Any] = weakref.WeakSet()
_names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


@contextmanager
def observed(model: torch.nn.Module, note: Note) -> Iterator[None]:
    """Tell of every gather and every reduction of FSDP's, until the context is left.

    Args:
        model: After whose modules flat parameters are named.
        note: Told on the thread that gathers or reduces: in backward on a GPU, autograd's own.
    """
    _names.update({module: strip_wrappers(name) for name, module in model.named_modules()})
    with _fsdp.heard_by(note):
        yield


def at_rest() -> Iterator[Owned]:
    """Shards, and what stays unsharded between steps: a root's parameters, those that are never resharded."""
    for group in list(_groups):
        yield from _unsharded(group)
        if (last := getattr(group.comm_ctx, "all_gather_state", None)) is not None:  # kept until the next gather
            yield Category.GATHERED, "all_gather_output", last.all_gather_result.all_gather_output
        for param in group.fsdp_params if not group.is_sharded else ():  # else its modules have them
            yield Category.PARAMETERS, _parameter_name(param), param.sharded_param
    for handle in list(_handles):
        yield from _flat_buffers(handle)
        if (shard := getattr(handle.flat_param, "_local_shard", None)) is not None:
            yield Category.PARAMETERS, f"{_handle_name(handle)}flat_param", shard


def sharded_parameters() -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that an optimizer updates, whether or not their modules have them at the moment."""
    for group in list(_groups):
        for param in group.fsdp_params:
            yield _parameter_name(param), param.sharded_param


def stand_ins() -> set[int]:
    """The `id` of every parameter that stands in a module for its shard at the moment."""
    found = {id(p._unsharded_param) for g in list(_groups) for p in g.fsdp_params if hasattr(p, "_unsharded_param")}
    for handle in list(_handles):
        if not _same_storage(handle.flat_param, handle.flat_param._local_shard):
            found |= {id(handle.flat_param), *map(id, handle.flat_param._params or ())}
    return found


# --- fully_shard --------------------------------------------------------------------


def _wrap_all(undo: ExitStack) -> None:
    if (groups := sys.modules.get(f"{FULLY_SHARD}._fsdp_param_group")) is not None:
        group = groups.FSDPParamGroup
        wrap(undo, group, "unshard", after=_afterwards(_gathering))
        wrap(undo, group, "wait_for_unshard", after=_afterwards(_unsharded))
        wrap(undo, group, "reshard", after=_afterwards(_unsharded))
        wrap(undo, group, "post_backward", before=partial(_tell, _gradients), after=_afterwards(_reduced))
        collectives = sys.modules[f"{FULLY_SHARD}._fsdp_collectives"]
        wrap(undo, collectives, "_get_param_all_gather_inputs", after=partial(_tell, _copied_in))
    if (handles := sys.modules.get(f"{FSDP1}._flat_param")) is not None:
        for method in ("pre_unshard", "unshard", "post_unshard", "reshard"):
            wrap(undo, handles.FlatParamHandle, method, after=_afterwards(_flat_buffers))
        runtime = sys.modules[f"{FSDP1}._runtime_utils"]
        wrap(undo, runtime, "_reduce_grad", before=partial(_tell, _flat_gradients), after=_afterwards(_flat_gradients))
        wrap(undo, runtime, "_get_reduce_scatter_tensors", after=partial(_tell, _flat_reduced))


_fsdp: WrappedFunctions[Note] = WrappedFunctions(_wrap_all)


def _tell(find: Find, *args: Any, **kwargs: Any) -> None:
    for note in _fsdp.listeners:
        note(find(*args, **kwargs))


def _afterwards(find: Find) -> Callable[..., None]:
    return lambda _result, *args, **kwargs: _tell(find, *args, **kwargs)


def _gathering(group: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """The output of an all-gather under way."""
    _groups.add(group)
    result = group._all_gather_result
    if result is not None:
        yield Category.GATHERED, f"{_group_name(group)}all_gather_output", result.all_gather_output


def _unsharded(group: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """The unsharded parameters; their storages are empty while they are sharded."""
    for param in group.fsdp_params:
        for tensor in (*param.all_gather_outputs, *getattr(param, "_unsharded_inner_tensors", ())):
            yield Category.GATHERED, _parameter_name(param), tensor
        post_forward = getattr(param, "_sharded_post_forward_param_data", None)
        if post_forward is not None:  # resharded to fewer ranks
            yield Category.GATHERED, _parameter_name(param), post_forward


def _gradients(group: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """Unsharded gradients: until they are reduced, or for as long as they are accumulated."""
    for param in group.fsdp_params:
        name = f"{_parameter_name(param)}.grad"
        unsharded = getattr(getattr(param, "_unsharded_param", None), "grad", None)
        for gradient in (unsharded, param.unsharded_accumulated_grad, param.sharded_param.grad):
            if gradient is not None:
                yield Category.GRADIENTS, name, gradient


def _reduced(group: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """The sharded gradients, and the buffers they were reduced in."""
    yield from _gradients(group)
    name = _group_name(group)
    if group._partial_reduce_output is not None:
        yield Category.GRADIENTS, f"{name}partial_reduce_output", group._partial_reduce_output
    for state in _states(group):
        yield Category.COMMUNICATION, f"{name}reduce_scatter_input", state.reduce_scatter_input
    if (state := getattr(group, "_all_reduce_state", None)) is not None:
        yield Category.COMMUNICATION, f"{name}all_reduce_input", state.all_reduce_input


def _states(group: Any) -> list[Any]:
    """Reductions under way; older versions of torch keep one."""
    context = group.comm_ctx
    single = getattr(context, "reduce_scatter_state", None)
    return [*getattr(context, "reduce_scatter_states", ())[-1:], *([single] if single is not None else [])]


def _copied_in(inputs: list[list[torch.Tensor]], params: list[Any], *_: Any, **__: Any) -> Iterator[Owned]:
    """Shards in the dtype, or on the device, in which they are gathered."""
    for param, tensors in zip(params, inputs, strict=True):
        shard = param._sharded_local_tensor
        for tensor in tensors:
            if not _same_storage(tensor, shard):
                yield Category.COMMUNICATION, f"{_parameter_name(param)}.all_gather_input", tensor


def _same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a wrapper's, which has none
        return False


def _group_name(group: Any) -> str:
    name = strip_wrappers(group._module_fqn or "")
    return f"{name}." if name else ""


def _parameter_name(param: Any) -> str:
    name = getattr(param, "_param_fqn", None) or param._module_info.param_name
    return strip_wrappers(name)


# --- FullyShardedDataParallel ---------------------------------------------------------


def _flat_buffers(handle: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    """The gathered flat parameter and its shard in the dtype of the gather; both are empty at times."""
    _handles.add(handle)
    flat, name = handle.flat_param, _handle_name(handle)
    for attribute in ("_full_param_padded", "_full_prec_full_param_padded"):
        if (tensor := getattr(flat, attribute, None)) is not None:
            yield Category.GATHERED, f"{name}flat_param", tensor
    if (tensor := getattr(flat, "_mp_shard", None)) is not None:
        yield Category.COMMUNICATION, f"{name}flat_param.all_gather_input", tensor


def _flat_gradients(_state: Any, handle: Any, *_: Any, **__: Any) -> Iterator[Owned]:
    flat, name = handle.flat_param, f"{_handle_name(handle)}flat_param.grad"
    for gradient in (flat.grad, getattr(flat, "_saved_grad_shard", None)):
        if gradient is not None:
            yield Category.GRADIENTS, name, gradient


def _flat_reduced(
    tensors: tuple[torch.Tensor, torch.Tensor], _state: Any, unsharded: torch.Tensor, **_: Any
) -> Iterator[Owned]:
    """The gradient is reduced where it lies, unless it has to be padded."""
    padded, sharded = tensors
    if not _same_storage(padded, unsharded):
        yield Category.COMMUNICATION, "flat_param.reduce_scatter_input", padded
    yield Category.GRADIENTS, "flat_param.grad", sharded


def _handle_name(handle: Any) -> str:
    name = _names.get(handle._fully_sharded_module, "")
    return f"{name}." if name else ""
