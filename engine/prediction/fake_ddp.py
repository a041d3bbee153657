"""DistributedDataParallel on the modelled device: its buffers by the rules of its reducer.

The reducer is written in C++ and reads what a fake tensor does not have. What it
allocates follows from sizes and from the order in which gradients become ready
(torch/csrc/distributed/c10d/reducer.cpp):

    constructor   rank 0's parameters and buffers are broadcast in pieces of 250 MiB, two at a time
                  one bucket for all gradients
    2nd forward   the bucket goes; buckets of 25 MiB, the first of 1 MiB, in the order in which
                  gradients became ready
    backward      every gradient is copied into its bucket; with `gradient_as_bucket_view` it is
                  then let go of, and the place in the bucket is the gradient

The bucket that goes may stay for a while. What NCCL has reduced and nobody has waited for by
name (the reducer waits for its future) it keeps until the next collective after its watchdog,
which looks ten times a second, has seen the end. Whether that is before the new buckets' order
is broadcast is chance: ranks of one job have differed, of models with buffers to broadcast and
without. At the latest it goes as the first bucket is reduced. So it counts as what may be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ..categories import Category
from ..module_names import strip_wrappers
from ..tracing.owners import Owned
from .caching_allocator import rounded_bytes

BROADCAST_BYTES = 250 << 20
BROADCASTS_IN_FLIGHT = 2
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20

Repeated = Callable[[Iterable[str]], Iterator[str]]
"""From names of parameters that are traced, in order, each as often as parameters like it come there."""


Note = Callable[[Iterable[Owned]], None]
"""Told of tensors whose owner is known."""

MayKeep = Callable[[int], Callable[[], None]]
"""Told of bytes that are given up and may stay until what it returns is called."""

BUCKETS = "DistributedDataParallel.buckets"


class Piece(NamedTuple):
    """A tensor of the model.

    Attributes:
        name: Of it, or of another that it is like.
        numel: Elements.
        dtype: Of them.
    """

    name: str
    numel: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size."""
        return self.numel * self.dtype.itemsize


def buckets(pieces: Iterable[Piece], *limits_bytes: int) -> list[list[Piece]]:
    """Tensors in buckets of one dtype: a bucket is full as soon as it has reached its limit.

    Args:
        pieces: In the order in which they come.
        limits_bytes: Of the first bucket of a dtype, of the second, ..., of all others.
    """
    full: list[list[Piece]] = []
    filling: dict[torch.dtype, list[Piece]] = {}
    closed: dict[torch.dtype, int] = {}
    for piece in pieces:
        bucket = filling.setdefault(piece.dtype, [])
        bucket.append(piece)
        nth = closed.get(piece.dtype, 0)
        if sum(each.bytes for each in bucket) >= limits_bytes[min(nth, len(limits_bytes) - 1)]:
            full.append(filling.pop(piece.dtype))
            closed[piece.dtype] = nth + 1
    return full + list(filling.values())


class FakeDDP(torch.nn.Module):
    """Stands in for `DistributedDataParallel`.

    Args:
        module: The model.
        repeated: See `Repeated`.
        note: Told of the buckets and of what they are, while they are there.
        gradient_as_bucket_view: Whether gradients are views of the buckets.
        may_keep: See `MayKeep`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        repeated: Repeated,
        note: Note,
        gradient_as_bucket_view: bool,
        may_keep: MayKeep,
    ) -> None:
        super().__init__()
        self.module = module
        self._note = note
        self.require_backward_grad_sync = True
        self._repeated, self._bucket_view = repeated, gradient_as_bucket_view
        self._reducing = False
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._buffers_sent = [_piece(name, buffer) for name, buffer in module.named_buffers()]
        self._device = next(iter(self._trained.values())).device
        everything = [_piece(name, p) for name, p in module.named_parameters()]
        self._broadcast(self._all(everything + self._buffers_sent))
        self._contents: list[torch.Tensor] = []
        self._may_keep = may_keep
        self._let_go: tuple[str, Callable[[], None]] | None = None
        self._sends_buffers = True
        self._places: dict[str, torch.Tensor] = {}
        self._ready: list[str] | None = []
        trained = [_piece(name, p) for name, p in self._trained.items()]
        self._fill(buckets(self._all(trained), 1 << 62))
        for name, parameter in self._trained.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Make the buckets anew once the order of gradients is known, and run the model."""
        self._tell()
        if self._ready:
            pieces = [_piece(name, self._trained[name]) for name in self._ready]
            full = buckets(self._all(pieces), FIRST_BUCKET_BYTES, BUCKET_BYTES)
            given_up = sum(rounded_bytes(contents.untyped_storage().nbytes()) for contents in self._contents)
            self._ready = None
            self._contents.clear()
            self._places.clear()
            self._let_go = full[0][-1].name, self._may_keep(given_up)
            self._fill(full)
        if self._sends_buffers and self._buffers_sent:
            self._broadcast(self._all(self._buffers_sent))
        self._reducing = self._sends_buffers = self.require_backward_grad_sync and torch.is_grad_enabled()
        return self.module(*args, **kwargs)

    def _tell(self) -> None:
        category = Category.GRADIENTS if self._bucket_view else Category.COMMUNICATION
        self._note((category, BUCKETS, contents) for contents in self._contents)

    def _all(self, pieces: list[Piece]) -> list[Piece]:
        """The parameters of the model as it is, from those of what is traced."""
        known = {strip_wrappers(piece.name): piece for piece in pieces}
        return [known[name] for name in self._repeated(known)]

    def _broadcast(self, pieces: list[Piece]) -> None:
        in_flight: list[torch.Tensor | None] = []
        for bucket in buckets(pieces, BROADCAST_BYTES):
            if len(in_flight) == BROADCASTS_IN_FLIGHT:
                in_flight.pop(0)
            # A tensor that has a piece to itself is sent as it is.
            in_flight.append(self._empty(bucket) if len(bucket) > 1 else None)

    def _fill(self, full: list[list[Piece]]) -> None:
        for bucket in full:
            contents, offset = self._empty(bucket), 0
            self._contents.append(contents)
            for piece in bucket:
                self._places[piece.name] = contents.narrow(0, offset, piece.numel)
                offset += piece.numel
        self._tell()

    def _empty(self, bucket: list[Piece]) -> torch.Tensor:
        return torch.empty(sum(piece.numel for piece in bucket), dtype=bucket[0].dtype, device=self._device)

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def ready(parameter: torch.Tensor) -> None:
            if not self._reducing:
                return
            if self._ready is not None:
                self._ready.append(name)
            if self._let_go is not None and self._let_go[0] == name:  # the first bucket is full, and reduced
                self._let_go[1]()
                self._let_go = None
            if self._bucket_view:
                parameter.grad = self._places[name].view_as(parameter)

        return ready


def _piece(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name, tensor.numel(), tensor.dtype)
