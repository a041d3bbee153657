"""Activations on the host between forward and backward.

    with ActivationsOnHost(model):    around a forward pass, or around a checkpointed segment
        outputs = model(...)

What autograd saves is copied into pinned memory on the compute stream and brought back when
its node runs, as `torch.autograd.graph.save_on_cpu` does, or on a second stream
(`offload_stream`), as TRL's `OffloadActivations` does. As there parameters, buffers and what is
small stay. A storage that several nodes save travels once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from .listeners import Listeners
from .offload_stream import ComputeStream, Copies, SecondStream

LEAST_BYTES = 1024
"""A storage of fewer stays where it is (TRL's `min_offload_size`)."""

HOST = torch.device("cpu")

Told = Callable[[torch.Tensor, bool], None]
"""Called with what is on the device for offloading's sake, and whether it is there until it has been copied away."""

observers: Listeners[Told] = Listeners()
"""Each is told of every storage that is stashed in forward or comes back."""


def _tell(tensor: torch.Tensor, stashed: bool) -> None:
    for each in observers.listeners:
        each(tensor, stashed)


class _OnHost:
    """The content of a storage, on the host until it is first asked for.

    Args:
        flat: All of the storage, one-dimensional and on the device.
        copies: Makes the copies, there and back.
    """

    def __init__(self, flat: torch.Tensor, copies: Copies) -> None:
        self._device, self._copies = flat.device, copies
        self._host: torch.Tensor | None = copies.away(self, flat, _page_locked)
        self._back: torch.Tensor | None = None
        if copies.stashes:
            _tell(flat, True)

    def back(self) -> torch.Tensor:
        """The storage's content on the device, where it stays for as long as a node wants it."""
        if self._back is None:
            assert self._host is not None
            self._back, self._host = self._copies.back(self, self._host, self._device), None
            _tell(self._back, False)
        self._copies.used(self)
        return self._back


def _page_locked(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=HOST, pin_memory=True)


@dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor in a storage that is on the host."""

    storage: _OnHost
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class ActivationsOnHost(saved_tensors_hooks):
    """Hooks that keep what is saved for backward on the host; may be entered again and again.

    Args:
        model: Its parameters and buffers stay on the device.
        second_stream: Copy beside the computation and not within it.
    """

    def __init__(self, model: torch.nn.Module, second_stream: bool = False) -> None:
        self._model = weakref.ref(model)
        self._copies: Copies = SecondStream() if second_stream else ComputeStream()
        self._staying: dict[int, weakref.ref[Any]] = {}
        self._moved: dict[int, tuple[weakref.ref[Any], int, weakref.ref[_OnHost]]] = {}
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        model = self._model()
        if model is not None:
            named = [*model.parameters(), *model.buffers()]
            # By reference: a layer may give a bias other data while it runs, and an address is used again.
            storages = [tensor.untyped_storage() for tensor in named]
            self._staying = {storage._cdata: weakref.ref(storage) for storage in storages}
        self._moved.clear()
        self._copies.forward_begins()
        super().__enter__()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        storage = tensor.untyped_storage()
        staying = self._staying.get(storage._cdata)
        if tensor.device == HOST or storage.nbytes() < LEAST_BYTES or (staying is not None and staying() is storage):
            return tensor
        if storage.nbytes() % tensor.element_size():
            return tensor
        moved = self._host_copy(tensor, storage)
        return _Saved(moved, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def _host_copy(self, tensor: torch.Tensor, storage: Any) -> _OnHost:
        """The copy of a storage; the one there is, if nothing has been written since."""
        reference, version, copy = self._moved.get(storage._cdata, (None, 0, None))
        known = copy() if copy is not None else None
        if known is not None and reference is not None and reference() is storage and version == tensor._version:
            return known
        with torch.no_grad():
            made = _OnHost(tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0), self._copies)
        self._moved[storage._cdata] = weakref.ref(storage), tensor._version, weakref.ref(made)
        return made

    @staticmethod
    def _unpack(saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        flat = saved.storage.back()
        return flat.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)
