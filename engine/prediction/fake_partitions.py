"""Parameters of ZeRO stage 3 on the modelled device: partitioned over the ranks, gathered by the modules that use them.

    partition  every rank holds an equal part of each parameter, the last one's is padded
    gather     of one parameter: into a tensor that it is a view of. Of several: into one flat tensor, of
               which each parameter is a copy once it is waited for; the flat tensor is held until the last is

(deepspeed/runtime/zero/partition_parameters.py)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto

import torch


class Status(Enum):
    """The share of a parameter that a rank has."""

    PARTITIONED = auto()
    IN_FLIGHT = auto()
    AVAILABLE = auto()


class Partition:
    """A parameter of which each rank holds a part.

    Args:
        parameter: Whole; it is left empty.
        number: Parameters are gathered in this order.
        ranks: That it is partitioned over.
        home: The device of the part.
        persistent: Whether it is left gathered until the optimizer steps.

    Attributes:
        share: Elements of the part.
        used_by: The `id` of every module that is computing with it.
    """

    def __init__(
        self, parameter: torch.nn.Parameter, number: int, ranks: int, home: torch.device, persistent: bool
    ) -> None:
        self.parameter, self.number, self.ranks, self.persistent = parameter, number, ranks, persistent
        self.shape, self.numel = parameter.shape, parameter.numel()
        self.share = -(-self.numel // ranks)
        self.used_by: set[int] = set()
        self.status = Status.AVAILABLE
        self.device = parameter.device
        self.part = torch.empty(self.share, dtype=parameter.dtype, device=home)
        parameter.ds_id = number  # type: ignore[attr-defined]
        self.free()

    @property
    def part(self) -> torch.Tensor:
        """The elements that this rank holds, of shape (share,)."""
        return self.parameter.ds_tensor  # type: ignore[attr-defined,no-any-return]

    @part.setter
    def part(self, part: torch.Tensor) -> None:
        self.parameter.ds_tensor = part  # type: ignore[attr-defined]  # DeepSpeed's name, by which its owner is found

    def free(self) -> None:
        """Let go of the gathered parameter."""
        self.parameter.data = torch.empty(0, dtype=self.part.dtype, device=self.device)
        self.status = Status.PARTITIONED

    def become(self, gathered: torch.Tensor) -> None:
        """Take a gathered tensor, of at least `numel` elements, for the parameter's data."""
        self.parameter.data = gathered.narrow(0, 0, self.numel).view(self.shape)

    def empty_padded(self) -> torch.Tensor:
        """Room for the parts of all ranks."""
        return torch.empty(self.share * self.ranks, dtype=self.part.dtype, device=self.device)


class Gathering:
    """An all-gather under way.

    Args:
        partitions: In no order; none is gathered yet.
    """

    def __init__(self, partitions: Iterable[Partition]) -> None:
        self._partitions = sorted(partitions, key=lambda each: each.number)
        for each in self._partitions:
            each.status = Status.IN_FLIGHT
        self._flat: list[torch.Tensor] = []
        self._sent: torch.Tensor | None = None
        only = self._partitions[0]
        if only.ranks == 1:
            for each in self._partitions:
                each.become(each.part.to(each.device))
        elif len(self._partitions) == 1:
            only.become(only.empty_padded())
            self._sent = only.part.to(only.device)  # the part itself, or a copy of one that is on the host
        else:
            self._flat = [_flat(some) for some in _by_dtype(self._partitions)]

    @property
    def flat(self) -> Sequence[torch.Tensor]:
        """Tensors that are gathered into, where these are not the parameters."""
        return self._flat

    def wait(self) -> None:
        """Have the parameters; the flat tensor is there for as long as this is."""
        self._sent = None
        for each in self._partitions:
            if each.status is Status.IN_FLIGHT:
                if self._flat:
                    each.become(torch.empty(each.numel, dtype=each.part.dtype, device=each.device))
                each.status = Status.AVAILABLE


def gather_now(partitions: Sequence[Partition]) -> None:
    """Gather parameters and wait for them: each into a tensor of its own.

    Args:
        partitions: Those that are gathered already stay as they are.
    """
    missing = [each for each in partitions if each.status is Status.PARTITIONED]
    sent = [each.part.to(each.device) for each in missing] if len(missing) > 1 else []
    for each in missing:
        each.become(each.part.to(each.device) if each.ranks == 1 else each.empty_padded())
        if not sent:
            each.part.to(each.device)
        each.status = Status.AVAILABLE


def _flat(partitions: Sequence[Partition]) -> torch.Tensor:
    ranks, part = partitions[0].ranks, partitions[0].part
    numel = sum(each.share for each in partitions)
    flat = torch.empty(numel * ranks, dtype=part.dtype, device=partitions[0].device)
    copied_in = [each.part.to(each.device) for each in partitions]
    del copied_in
    return flat


def _by_dtype(partitions: Sequence[Partition]) -> list[list[Partition]]:
    found: dict[torch.dtype, list[Partition]] = {}
    for each in partitions:
        found.setdefault(each.part.dtype, []).append(each)
    return list(found.values())
