"""NCCL's memory: what the process holds more after its first uses, each measured once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpumem_tui.engine import nccl

CONTEXT, KIND = 500 << 20, 60 << 20


class Growing:
    """A device on which a process holds more with every reading, as if all that is measured took memory."""

    def __init__(self) -> None:
        self.readings = 0

    def __call__(self, _device_id: object) -> int:
        self.readings += 1
        return CONTEXT + KIND * (self.readings // 2)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Growing]:
    growing = Growing()
    monkeypatch.setattr(nccl, "memory", nccl.NcclMemory())
    monkeypatch.setattr(nccl, "_beyond_torch_bytes", growing)
    yield growing
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_and_the_first_collective_of_each_kind_are_measured(device: Growing) -> None:
    before = dist.init_process_group, dist.ProcessGroup.allreduce
    with nccl.observed():
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        assert nccl.memory.measured_bytes == KIND
        for _ in range(3):
            dist.all_reduce(torch.zeros(1))
        assert nccl.memory.measured_bytes == 2 * KIND, "the first alone"
        dist.broadcast(torch.zeros(1), 0)
        group = dist.new_group()
        dist.all_reduce(torch.zeros(1), group=group)
        assert nccl.memory.measured_bytes == 5 * KIND and device.readings == 10
    assert (dist.init_process_group, dist.ProcessGroup.allreduce) == before
    dist.all_reduce(torch.zeros(1))
    dist.barrier()


def test_who_observes_twice_measures_once(device: Growing) -> None:
    with nccl.observed(), nccl.observed():
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    assert nccl.memory.measured_bytes == KIND


def test_without_nccl_there_is_nothing_to_tell(device: Growing) -> None:
    """Nor does a measurement that fails disturb the collective."""
    cpu = torch.device("cpu")
    assert nccl.memory.held_bytes(cpu) is None
    with nccl.observed():
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        nccl.memory._known = None  # type: ignore[assignment]
        dist.all_reduce(torch.zeros(1))
    assert nccl.memory.held_bytes(cpu) is None, "the group is none of NCCL's"
