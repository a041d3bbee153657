"""NCCL's memory: what it counts, or else what its log tells, which is asked for before its first group is made.

The log is that of a real communicator: NCCL 2.28.9, two H100s, until its first all-reduce was over. The
process held 484 MiB less on its GPU once the communicator had been destroyed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpumem_tui.engine import nccl, techniques
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.nccl import communicators, nccl_bytes
from gpumem_tui.profiles import run_fields

LOGGED = (Path(__file__).parent / "data" / "nccl-2.28.9.log").read_text()
MIB = 1 << 20
GPU = torch.device("cuda", 0)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[nccl.AllocationLog]:
    """The log of a process in which NCCL has not begun, and of a user who has said nothing of it."""
    for name in [name for name in os.environ if name.startswith("NCCL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(nccl, "log", nccl.AllocationLog())
    yield nccl.log
    for name in nccl.log._asked_for:
        os.environ.pop(name, None)
    if nccl.log._file is not None:
        os.close(nccl.log._file)
    if dist.is_initialized():
        dist.destroy_process_group()


def write(text: str) -> Path:
    """Write the log where NCCL is asked to."""
    assert os.environ["NCCL_DEBUG"] == "INFO"
    file = Path(os.environ["NCCL_DEBUG_FILE"])
    file.write_text(text)
    return file


def append(file: Path, text: str) -> None:
    with file.open("a") as opened:
        opened.write(text)


def settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}


def test_the_log_tells_what_a_communicator_holds(log: nccl.AllocationLog) -> None:
    log.ask_for()
    assert log.held_bytes() is None and settings(), "NCCL has not begun"
    file = write(LOGGED)
    assert log.held_bytes() == 484 * MIB
    assert not settings(), "it has read them: what the script starts is not ours"
    append(file, "host:1:1 [0] NCCL INFO channel.cc:42 Cuda Alloc Size 1216 pointer 0x55500000")
    assert log.held_bytes() == 484 * MIB, "the line is not whole yet"
    append(file, "0000\n")
    assert log.held_bytes() == 486 * MIB
    log.ask_for()
    assert not settings(), "nobody reads them again"


@pytest.mark.parametrize(
    ("lines", "mib"),
    [
        ("enqueue.cc:1 Cuda Calloc Size 4194305 pointer 0x7f0000000000 memType 0", 6),
        ("init.cc:1 Cuda CallocAsync Size 8 pointer 0x7f0000000200 memType 0\n"
         "init.cc:2 Cuda Alloc Size 8 pointer 0x7f0000000400", 2),
        ("transport/p2p.cc:2 Cuda Alloc Size 10485760 pointer 0x7f0000000000\n"
         "Allocated shareable buffer 0x7f0000000000 size 10485760 ipcDesc 0x7f1", 10),
        ("NVLS rank 0 (dev 0) alloc done, ucptr 0x7f0000000000 ucgran 2097152 mcptr 0x7e0000000000 mcgran 2097152 "
         "ucsize 33554432 mcsize 67108864 (inputsize 33550336)", 32),
        ("init.cc:1 Cuda Host Alloc Size 1048576 pointer 0x7f0000000200\nx.cc:1 Cuda Alloc Size 0 pointer (nil)\n"
         "Imported shareable buffer device 0 size 10485760 ptr 0x7f2000000000\n"
         "NVLS Unmap mem UC handle 0x1(0x7f0000000000) ucsize 33554432 MC handle 0x2(0x7e0000000000) mcsize 1", 0),
    ],
    ids=["a newer NCCL's", "cudaMalloc's share a page", "logged twice", "through a switch", "not on this GPU"],
)  # fmt: skip
def test_pages_are_counted_once_and_only_this_gpu_s(log: nccl.AllocationLog, lines: str, mib: int) -> None:
    log.ask_for()
    write("".join(f"host:1:2 [0] NCCL INFO {line}\n" for line in lines.split("\n")))
    assert log.held_bytes() == mib * MIB


def test_what_the_user_has_said_of_nccl_s_log_stays(log: nccl.AllocationLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NCCL_DEBUG", "WARN"), ("NCCL_DEBUG_SUBSYS", "COLL"), ("NCCL_DEBUG_FILE", "/tmp/mine.%p")):
        with monkeypatch.context() as set_by_user:
            set_by_user.setenv(name, value)
            log.ask_for()
            assert settings() == {name: value}
    (Path.home() / ".nccl.conf").write_text("NCCL_IB_DISABLE=1\nNCCL_DEBUG=INFO\n")
    log.ask_for()
    assert not settings() and log.held_bytes() is None
    (Path.home() / "other.conf").write_text("NCCL_IB_DISABLE=1\n")
    monkeypatch.setenv("NCCL_CONF_FILE", str(Path.home() / "other.conf"))
    log.ask_for()
    assert settings()["NCCL_DEBUG_SUBSYS"] == "ALLOC,NVLS", "that file is read in place of the other"


def test_the_log_is_asked_for_before_nccl_s_first_group(log: nccl.AllocationLog) -> None:
    before = dist.init_process_group, dist.destroy_process_group, dist.distributed_c10d._new_process_group_helper
    with nccl.observed(), nccl.observed():
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        assert not settings(), "the group is none of NCCL's"
        with suppress(RuntimeError):  # a torch for CPUs has no NCCL
            dist.new_group(backend="nccl", timeout=timedelta(seconds=1))
        assert settings()
        write(LOGGED)
        assert nccl.log.held_bytes() == 484 * MIB
        dist.destroy_process_group()
        assert nccl.log.held_bytes() == 0
    after = dist.init_process_group, dist.destroy_process_group, dist.distributed_c10d._new_process_group_helper
    assert after == before


def test_nccl_s_own_count_goes_before_its_log(log: nccl.AllocationLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of a run may have no communicator yet."""
    assert nccl.held_bytes(GPU) is None, "there is no group"
    log.ask_for()
    write(LOGGED)
    assert nccl.held_bytes(GPU) is None

    def group(**statistics: int) -> Any:
        backend = SimpleNamespace(memory_stats=lambda: statistics)
        return SimpleNamespace(_get_backend=lambda _: backend)

    monkeypatch.setattr(nccl, "_groups", lambda: [group(), object()])
    assert nccl.held_bytes(GPU) == 484 * MIB
    monkeypatch.setattr(nccl, "_groups", lambda: [group(total=5), group(), group(total=7)])
    assert nccl.held_bytes(GPU) == 12


@pytest.mark.parametrize(
    ("settings", "ranks", "measured_mib"),
    [
        ({"parallel": "ddp"}, 2, 1610),
        ({"parallel": "fsdp2"}, 2, 1614),
        ({"parallel": "fsdp2"}, 4, 1614),
        ({"parallel": "fsdp2", "parallel.shard": "hybrid"}, 4, 2584),
        ({"parallel": "zero1"}, 2, 2104),
        ({"parallel": "zero2"}, 2, 2104),
    ],
)
def test_outside_of_torch_is_predicted(settings: dict[str, Any], ranks: int, measured_mib: int) -> None:
    """As measured on H100s: `tests/benchmarks/results/ranks-*.json`."""
    config = techniques.configure(run_fields("tiny"), {**settings, "parallel.ranks": ranks})
    outside = gpu("H100 80GB").context_bytes + nccl_bytes(config, ranks)
    assert outside == pytest.approx(measured_mib * MIB, abs=0.05 * 2**30)


def test_a_group_of_one_rank_has_no_communicator() -> None:
    hybrid = {"parallel": "fsdp2", "parallel.shard": "hybrid", "parallel.ranks": 4}
    config = techniques.configure(run_fields("tiny"), hybrid)
    assert [communicators(config, ranks) for ranks in (1, 2, 4)] == [0, 2, 3]
    assert communicators(config.with_({"parallel.shard_ranks": 4}), 4) == 1, "the job's own has the same ranks"
