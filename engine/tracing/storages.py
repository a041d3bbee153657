"""The tensors whose storages a tensor consists of."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def parts_of(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensor itself, if it has a storage; otherwise those that it consists of.

    A wrapper (DTensor, torchao's quantized tensors) has its inner tensors, a sparse
    tensor its indices and values, one of `torch.func` the tensor that it wraps.
    """
    if type(tensor) in _PLAIN and tensor.layout is torch.strided and not _is_transformed(tensor):
        return (tensor,)
    return _inner_parts(tensor)


def _inner_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, torch.Tensor):
                yield from parts_of(inner)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED:
        for method in _COMPRESSED[tensor.layout]:
            yield from parts_of(getattr(tensor, method)())
        yield from parts_of(tensor.values())
    elif _is_transformed(tensor):
        yield from parts_of(torch._C._functorch.get_unwrapped(tensor))
    elif tensor.layout is torch.strided:
        yield tensor


def _is_transformed(tensor: torch.Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_fake(tensor: Any) -> bool:
    """True if a tensor has no memory, as while something is exported or compiled."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)
