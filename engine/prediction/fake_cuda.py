"""PyTorch and transformers made to take, on fake CPU tensors, the paths they take on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from . import bitsandbytes_cuda
from .attention import sdpa
from .gpus import Gpu
from .tracker import DEVICE, FakeCuda


@contextmanager
def cuda_paths(gpu: Gpu, tracker: FakeCuda) -> Iterator[None]:
    """Everything that asks for the type of the device is told what it needs to hear."""
    with ExitStack() as undo:
        library = torch.library.Library("aten", "IMPL")
        undo.callback(library._destroy)
        library.impl("scaled_dot_product_attention", lambda *a, **k: sdpa(gpu, *a, **k), "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        _replace(undo, torch.utils._foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
        import transformers.modeling_utils
        from transformers import masking_utils

        _replace(undo, masking_utils, "is_tracing", lambda *_: False)
        _replace(undo, transformers.modeling_utils, "caching_allocator_warmup", lambda *a: _warm_up(tracker, *a))
        _replace(undo, torch.cuda, "empty_cache", tracker.allocator.empty_cache)
        if bitsandbytes_cuda.installed():
            undo.enter_context(bitsandbytes_cuda.cuda_backend(gpu, tracker))
        _replace(undo, torch.utils, "swap_tensors", _set_data)
        for name in ("tensor", "as_tensor"):
            _replace(undo, torch, name, _moved(getattr(torch, name)))
        yield


def _warm_up(tracker: FakeCuda, model: Any, device_map: dict[str, Any], quantizer: Any) -> None:
    """transformers takes one large block for all weights from an empty cache and gives it back."""
    from transformers.modeling_utils import get_total_byte_count

    wanted = sum(get_total_byte_count(model, dict.fromkeys(device_map, DEVICE), quantizer).values())
    unused = tracker.allocator.reserved_bytes - tracker.allocator.allocated_bytes
    if wanted - unused > unused:
        tracker.scratch(int((wanted - unused) // 2) * 2)  # it counts in 16-bit elements


def _set_data(parameter: Any, moved: Any) -> None:
    """`Module.to` sets the data of a parameter; of a fake one it would swap the objects, which has its limits."""
    parameter.data = moved
    parameter.fake_device = moved.fake_device


def _moved(make: Any) -> Any:
    """`torch.tensor` makes its tensor on the host and then moves it; for a second CPU it does not."""

    def call(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None and torch.device(device) == DEVICE:
            return make(data, *args, **kwargs).to(DEVICE)
        return make(data, *args, device=device, **kwargs)

    return call


def _dropout(x, p, train):
    if train and 0 < p < 1 and x.numel():
        return torch.ops.aten.native_dropout(x, p, True)[0]
    if p == 0 or not train or not x.numel():
        return x
    return x * torch.zeros_like(x) if p == 1 else x


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    undo.callback(setattr, owner, name, before)
