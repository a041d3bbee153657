"""PyTorch and transformers made to take, on fake CPU tensors, the paths they take on a GPU."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..config import UserError
from . import autocast, bitsandbytes_cuda, packed_sequences, recurrent_cells, recurrent_layers, torchao_cuda
from .attention import flash_attn, sdpa
from .fake_cuda import DEVICE, FakeCuda
from .fused_losses import fused_losses
from .gpus import Gpu
from .object_detection import matched_in_order
from .stand_ins import standing_in

LOADED_BY_FLASH_ATTENTION = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)
"""Attributes in which transformers remembers the flash attention it loaded; an older one has fewer."""

_DATA: Any = torch.Tensor.data


FLASH_ATTENTION = "flash-attn"


@contextmanager
def cuda_paths(
    gpu: Gpu, tracker: FakeCuda, libraries: Collection[str] = (), times: Callable[[str], int] = lambda _: 1
) -> Iterator[None]:
    """Everything that asks for the type of the device is told what it needs to hear.

    Args:
        gpu: Which one it is.
        tracker: The recorder.
        libraries: Packages whose own kernels the run uses.
        times: How many parameters of the model the named one stands for.
    """
    with pytorch_paths(gpu, tracker), transformers_paths(gpu, tracker, libraries, times):
        if bitsandbytes_cuda.PACKAGE not in libraries:
            yield
            return
        with bitsandbytes_cuda.cuda_backend(gpu, tracker):
            yield


@contextmanager
def pytorch_paths(gpu: Gpu, tracker: FakeCuda) -> Iterator[None]:
    """Take the paths of PyTorch's own that depend on the device's type."""
    with ExitStack() as undo:
        logger = logging.getLogger("torch._subclasses.fake_tensor")  # it reports what is raised as well
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        library = torch.library.Library("aten", "IMPL")
        undo.callback(library._destroy)
        library.impl("scaled_dot_product_attention", lambda *a, **k: sdpa(gpu, *a, **k), "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("softmax.int", _fused_with_cast(torch.ops.aten._softmax), "AutogradCPU")
        library.impl("log_softmax.int", _fused_with_cast(torch.ops.aten._log_softmax), "AutogradCPU")
        autocast.register(library)
        recurrent_cells.register(library)
        recurrent_layers.register(library, tracker, gpu, undo)
        packed_sequences.register(library, tracker)
        replace(undo, torch.utils._foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
        replace(undo, torch.cuda, "empty_cache", tracker.empty_cache)
        replace(undo, FakeTensor, "data", property(_DATA.__get__, _set_data))
        _share_modes(undo)
        replace(undo, torch.utils, "swap_tensors", _set_data)
        for name in ("tensor", "as_tensor"):
            replace(undo, torch, name, _moved(getattr(torch, name)))
        yield


@contextmanager
def transformers_paths(
    gpu: Gpu, tracker: FakeCuda, libraries: Collection[str] = (), times: Callable[[str], int] = lambda _: 1
) -> Iterator[None]:
    """transformers', and those of the losses it can be given; imports it. Arguments as in `cuda_paths`."""
    import transformers.modeling_utils
    from transformers import masking_utils, modeling_flash_attention_utils

    with ExitStack() as undo:
        replace(undo, masking_utils, "is_tracing", lambda *_: False)
        if tracker.ragged and hasattr(masking_utils, "fast_all"):
            replace(undo, masking_utils, "fast_all", _not_all(masking_utils.fast_all))
        if FLASH_ATTENTION in libraries:
            _without_flash_attn(undo, gpu, modeling_flash_attention_utils, transformers.PreTrainedModel)
        replace(undo, transformers.modeling_utils, "caching_allocator_warmup", lambda *a: _warm_up(tracker, times, *a))
        undo.enter_context(fused_losses(tracker))
        undo.enter_context(standing_in({"torchao.optim": torchao_cuda.module(tracker)}))
        undo.enter_context(matched_in_order())
        yield


def _without_flash_attn(undo: ExitStack, gpu: Gpu, functions: Any, model_class: Any) -> None:
    """Stand in for transformers' use of the package flash-attn, which needs a GPU to be installed."""

    def can_dispatch(model: Any, flash_attn_version: int, is_init_check: bool = False) -> bool:
        if not model._supports_flash_attn:
            raise UserError(f"{type(model).__name__} does not support flash attention")
        if flash_attn_version != 2 or gpu.capability < (8, 0):
            raise UserError(f"flash attention needs a GPU of compute capability 8.0: {gpu.name} has not")
        return True

    def not_padded(*_args: Any, **_kwargs: Any) -> Any:
        raise UserError("flash attention over rows of several lengths cannot be predicted")

    def unpacked(position_ids: Any, batch_size: int) -> bool:
        is_packed(position_ids, batch_size)  # it compares them on the GPU, in every layer
        return False

    not_padded.__signature__ = inspect.signature(flash_attn)  # type: ignore[attr-defined]  # read for what it takes
    is_packed = functions._is_packed_sequence
    replace(undo, model_class, "_flash_attn_can_dispatch", can_dispatch)
    replace(undo, functions, "_is_packed_sequence", unpacked)
    replace(undo, functions, "_lazy_imports", lambda *_, **__: (flash_attn, not_padded, None, not_padded, not_padded))
    for name in LOADED_BY_FLASH_ATTENTION:
        if hasattr(functions, name):
            replace(undo, functions, name, None)


@contextmanager
def sets_in_order(model: Any) -> Iterator[None]:
    """Have a model's own code go through the sets it makes in the same order in every process.

    Several models go through `set(config.layer_types)` in each forward pass. The
    order of strings in a set changes with Python's hash seed, and with it where
    the allocator puts what is made for each of them.

    Args:
        model: A transformers model.
    """
    names = {type(module).__module__ for module in model.modules()}
    with ExitStack() as undo:
        for name in names:
            if name.startswith("transformers.") and not hasattr(sys.modules[name], "set"):
                vars(sys.modules[name])["set"] = _SortedSet  # seen instead of the built-in
                undo.callback(delattr, sys.modules[name], "set")
        yield


class _SortedSet(set[Any]):
    """A set that is gone through by its elements' texts."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))


def _not_all(fast_all: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """transformers counts what is set in a mask; where rows have several lengths that is not all of it."""

    def call(tensor: Any) -> Any:
        out = fast_all(tensor)
        out.is_any = True
        return out

    return call


def _warm_up(
    tracker: FakeCuda, times: Callable[[str], int], model: Any, device_map: dict[str, Any], quantizer: Any
) -> None:
    from transformers.modeling_utils import get_total_byte_count

    by_times: dict[int, dict[str, Any]] = {}
    for name, device in device_map.items():
        if torch.device(device) == DEVICE:  # some are read to the host first
            by_times.setdefault(times(name), {})[name] = DEVICE
    tracker.warm_up(
        int(sum(n * sum(get_total_byte_count(model, names, quantizer).values()) for n, names in by_times.items()))
    )


def _set_data(parameter: Any, moved: Any) -> None:
    """Setting the data of a fake tensor takes its device along.

    `Module.to` sets the data of a parameter; fake ones it would swap as objects,
    which it cannot do once anything refers to them.
    """
    _DATA.__set__(parameter, moved)
    parameter.fake_device = moved.fake_device


def _moved(make: Any) -> Any:
    """`torch.tensor` makes its tensor on the host and then moves it; for a second CPU it does not."""

    def call(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None and torch.device(device) == DEVICE:
            return make(data, *args, **kwargs).to(DEVICE)
        return make(data, *args, device=device, **kwargs)

    return call


def _dropout(tensor: Any, p: float, train: bool) -> Any:
    """CUDA's dropout is one kernel that keeps a mask of one byte an element."""
    if not train or p == 0 or not tensor.numel():
        return tensor
    if p == 1:
        return tensor * torch.zeros_like(tensor)
    return torch.ops.aten.native_dropout(tensor, p, True)[0]


def _fused_with_cast(operator: Any) -> Any:
    """CUDA's softmax converts float16 to float32 while it reads (`half_to_float`)."""

    def call(tensor: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
        if tensor.dtype is torch.float16 and dtype is torch.float32 and tensor.device == DEVICE:
            return operator(tensor, dim, True)
        return operator(tensor if dtype is None else tensor.to(dtype), dim, False)

    return call


def _share_modes(undo: ExitStack) -> None:
    """Have a copy of a fake tensor be one of the same mode.

    `copy.deepcopy`, as PEFT makes of modules it saves whole, would copy the mode
    with its weak references to storages: each is then given back twice, and the
    heap is damaged.
    """
    if "__deepcopy__" not in vars(FakeTensorMode):
        setattr(FakeTensorMode, "__deepcopy__", lambda mode, _memo: mode)  # noqa: B010  # it has none to assign to
        undo.callback(delattr, FakeTensorMode, "__deepcopy__")


def replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Put something in another's place, until undone.

    Raises:
        UserError: There is no such thing: these libraries are of a version that is not known here.
    """
    if not hasattr(owner, name):
        package = (owner.__name__ if isinstance(owner, ModuleType) else owner.__module__).partition(".")[0]
        raise UserError(f"{package} {metadata.version(package)} cannot be predicted: it has no {owner.__name__}.{name}")
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)
