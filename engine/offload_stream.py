"""Copies of activations to the host and back: on the compute stream, or on a second one.

The caching allocator gives a freed block to its own stream's next request at once. A block
that the other stream may still be at has to be held until that stream has passed an event:

    forward     one that is being copied away waits in the stash, five at the most
    backward    one that came back waits until its node is done and a node after that, too
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

MOST_STASHED = 5
"""TRL's `max_fwd_stash_size`."""

NewHost = Callable[[torch.Tensor], torch.Tensor]
"""Makes a tensor on the host like another on the device."""


class Copies(Protocol):
    """The way to the host and back; an owner is who wants a storage's content in backward.

    Attributes:
        stashes: Whether what is copied away stays on the device until that is done.
    """

    stashes: bool

    def away(self, owner: object, flat: torch.Tensor, new_host: NewHost) -> torch.Tensor:
        """The host's copy of a tensor."""
        ...

    def back(self, owner: object, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The content on the device again."""
        ...

    def used(self, owner: object) -> None:
        """The node that runs now uses what came back."""
        ...

    def forward_begins(self) -> None:
        """No earlier forward's activations are wanted any more, but those that have an owner."""
        ...


class ComputeStream:
    """Copies on the stream that computes: each takes its turn."""

    stashes = False

    def away(self, _owner: object, flat: torch.Tensor, new_host: NewHost) -> torch.Tensor:
        """The host's copy of a tensor."""
        return new_host(flat).copy_(flat, non_blocking=True)

    def back(self, _owner: object, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The content on the device again."""
        return host.to(device, non_blocking=True)

    def used(self, _owner: object) -> None:
        """Nothing to wait for: the stream does one after the other."""

    def forward_begins(self) -> None:
        """Nothing is held here."""


@dataclass(slots=True)
class _Stashed:
    """A tensor that is being copied away, and the event after which it is."""

    owner: weakref.ref[Any]
    flat: torch.Tensor
    copied: Any


@dataclass(slots=True, weakref_slot=True)
class _Arrived:
    """A tensor that has come back.

    Attributes:
        owner: Dead: no node wants it any more.
        references: To its storage, when it came.
        used_up_to: The event after which the last node that used it was done; None: none is yet.
    """

    owner: weakref.ref[Any]
    flat: torch.Tensor
    references: int
    used_up_to: Any = None


class SecondStream:
    """Copies on a stream of their own, beside the computation."""

    stashes = True

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._copying: Any = None
        self._stash: deque[_Stashed] = deque()
        self._arrived: list[_Arrived] = []
        self._task = -1

    @property
    def _computing(self) -> Any:
        """The stream that is current, which under FSDP or checkpointing is not always the same."""
        return torch.get_device_module(self._device).current_stream(self._device)

    def away(self, owner: object, flat: torch.Tensor, new_host: NewHost) -> torch.Tensor:
        """The host's copy of a tensor, which waits in the stash until that is made."""
        streams = torch.get_device_module(flat.device)
        if self._copying is None:
            self._device, self._copying = flat.device, streams.Stream(flat.device)
        self._empty_stash(MOST_STASHED - 1)
        self._copying.wait_stream(self._computing)
        with streams.stream(self._copying):
            host = new_host(flat).copy_(flat, non_blocking=True)
        self._stash.append(_Stashed(weakref.ref(owner), flat, self._copying.record_event()))
        return host

    def back(self, owner: object, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The content on the device again: what the stash still has, or a copy that the node waits for."""
        for stashed in self._stash:
            if stashed.owner() is owner:
                return stashed.flat
        if torch._C._current_autograd_node() is None:  # somebody reads a graph: nothing says when that is done
            return host.to(device, non_blocking=True)
        with torch.get_device_module(device).stream(self._copying):
            flat = host.to(device, non_blocking=True)
        self._computing.wait_stream(self._copying)
        self._arrived.append(_Arrived(weakref.ref(owner), flat, _references(flat)))
        if self._task != (task := torch._C._current_graph_task_id()):
            self._task = task
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._let_go)
        return flat

    def used(self, owner: object) -> None:
        """Have it noted when the node that runs now is done; what others used before it is let go of then."""
        node = torch._C._current_autograd_node()
        if node is None:
            return
        arrived = next((each for each in self._arrived if each.owner() is owner), None)
        wanted = weakref.ref(arrived) if arrived is not None else _nothing  # a graph may outlive its backward pass

        def done(*_: Any) -> None:
            self._empty_stash(0)
            if (just := wanted()) is not None:
                just.used_up_to = self._computing.record_event()
            self._let_go(just)

        node.register_hook(done)

    def forward_begins(self) -> None:
        """Let go of what a backward pass that never ended has left."""
        if self._arrived:
            self._let_go()

    def _empty_stash(self, left: int) -> None:
        """Let go of the tensors that were stashed first, each once it is copied."""
        while len(self._stash) > left:
            self._computing.wait_event(self._stash.popleft().copied)

    def _let_go(self, just: _Arrived | None = None) -> None:
        """Let go of what no node wants any more; `just`: its node has ended a moment ago."""
        kept: list[_Arrived] = []
        for arrived in self._arrived:
            if arrived is just or arrived.owner() is not None:
                kept.append(arrived)
                continue
            self._copying.wait_event(arrived.used_up_to or self._computing.record_event())
            if self._device.type == "cuda" and _references(arrived.flat) > arrived.references:
                arrived.flat.record_stream(self._computing)  # a view of it lives on: a recomputed layer's input
        self._arrived = kept


def _nothing() -> None:
    """No tensor that has come back."""


def _references(tensor: torch.Tensor) -> int:
    """References to a tensor's storage."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
