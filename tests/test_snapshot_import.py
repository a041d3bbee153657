"""PyTorch's snapshots on our screens: read without unpickling, with the categories that frames and lifetimes allow."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gpumem_tui.engine import snapshot
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import AllocatorPool, Phase, StepTrace
from gpumem_tui.engine.feed import Work
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import read, write
from gpumem_tui.engine.run_events import OutOfMemory
from gpumem_tui.engine.snapshot.imported import steps_of
from gpumem_tui.engine.trace_check import check
from gpumem_tui.tui.cli import main

from .snapshotter import Snapshotter
from .test_exports import ALL, recorded, written

STEPS, ROWS = 3, 8 * 16


class Recorded:
    """A loop, its snapshot, and what its tensors took."""

    def __init__(self) -> None:
        with Snapshotter() as taken:
            model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 64))
            optimizer = torch.optim.AdamW(model.parameters())
            for _ in range(STEPS):
                ids = torch.randint(0, 64, (8, 16))
                self.input_bytes = ids.nbytes
                logits = model(ids)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
                loss.backward()
                self.gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
                optimizer.step()
                optimizer.zero_grad()
        self.plain = taken.snapshot()
        self.parameter_bytes = sum(p.nbytes for p in model.parameters())
        self.state_bytes = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
        self.peak_bytes, self.end_bytes = taken.peak_bytes, taken.allocated_bytes


@pytest.fixture(scope="module")
def loop() -> Recorded:
    return Recorded()


def as_pickle(plain: Any, protocol: int = 4) -> bytes:
    return pickle.dumps(plain, protocol)


def imported(data: bytes, tmp_path: Path) -> list[StepTrace]:
    path = tmp_path / "snapshot"
    path.write_bytes(data)
    return steps_of(snapshot.read(path), 0)


# --- what it shows --------------------------------------------------------------------


def test_a_training_loop_comes_apart_into_its_steps(loop: Recorded, tmp_path: Path) -> None:
    load, *steps = imported(as_pickle(loop.plain), tmp_path)
    assert [load.step, *(step.step for step in steps)] == list(range(STEPS + 1))
    for step in steps:
        named = [span.phase for span in step.phases]
        assert named == [Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER, Phase.ZERO_GRAD]
    folded = [Ledger(step) for step in (load, *steps)]
    # Without the rounding to blocks, which the CPU does not do, these are the tracker's own figures.
    asked = [ledger.total - ledger.curve[Category.SLACK] for ledger in folded]
    assert max(int(total.max()) for total in asked) == loop.peak_bytes
    assert int(asked[-1][-1]) == loop.end_bytes
    assert all(int(a[-1]) == int(b[0]) for a, b in pairwise(asked)), "one step begins as another ends"
    assert not any(ledger.unmatched_frees for ledger in folded)


def test_categories_are_what_the_tensors_were(loop: Recorded, tmp_path: Path) -> None:
    load, first, *_, last = (Ledger(step) for step in imported(as_pickle(loop.plain), tmp_path))
    assert load.end[Category.PARAMETERS] == loop.parameter_bytes
    for ledger in (first, last):
        after = ledger.after(Phase.BACKWARD)
        assert after is not None
        assert after[Category.GRADIENTS] == loop.gradient_bytes
        assert ledger.end[Category.PARAMETERS] == loop.parameter_bytes
        assert ledger.end[Category.OPTIMIZER_STATE] == loop.state_bytes
    kept = last.after(Phase.FORWARD)
    assert kept is not None
    assert kept[Category.ACTIVATIONS] == ROWS * 4 * (32 + 128 + 128 + 64), "what each layer returns"
    assert kept[Category.LOGITS_LOSS] == ROWS * 4 * 64 + 4 + 4, "log-probabilities, the loss and its weight"
    assert kept[Category.INPUTS] == loop.input_bytes
    assert kept[Category.UNKNOWN] == 0


def test_a_block_is_named_after_the_place_that_made_it(loop: Recorded, tmp_path: Path) -> None:
    last = Ledger(imported(as_pickle(loop.plain), tmp_path)[-1])
    names = {block.name for block in last.largest(last.peak.event, 50)}
    assert all("test_snapshot_import.py:" in name or name == "loss" for name in names), names


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_json_say_the_same(loop: Recorded, tmp_path: Path, protocol: int) -> None:
    first = imported(json.dumps(loop.plain).encode(), tmp_path)
    for one, other in zip(first, imported(as_pickle(loop.plain, protocol), tmp_path), strict=True):
        np.testing.assert_array_equal(one.events, other.events)
        np.testing.assert_array_equal(Ledger(one).curve, Ledger(other).curve)


@pytest.mark.parametrize("name", ALL)
def test_our_own_export_comes_back_to_the_byte(name: str, tmp_path: Path) -> None:
    run = recorded(name)
    (step,) = imported(written("memory-viz", run), tmp_path)
    ledger = Ledger(step)
    assert ledger.peak.bytes == run.ledger.peak.bytes
    assert ledger.peak.by_category == run.ledger.peak.by_category
    assert ledger.end == run.ledger.end


def test_a_snapshot_without_stacks_is_unknown_rather_than_guessed(loop: Recorded, tmp_path: Path) -> None:
    bare = json.loads(json.dumps(loop.plain))
    for entry in bare["device_traces"][0]:
        del entry["frames"]
    for segment in bare["segments"]:
        del segment["blocks"][0]["frames"]
    (step,) = imported(json.dumps(bare).encode(), tmp_path)
    ledger = Ledger(step)
    assert int((ledger.total - ledger.curve[Category.SLACK]).max()) == loop.peak_bytes
    assert ledger.peak.by_category[Category.UNKNOWN] == ledger.peak.bytes - ledger.peak.by_category[Category.SLACK]


def test_what_lived_before_the_trace_is_there_from_the_start(loop: Recorded, tmp_path: Path) -> None:
    """A ring that was full has lost the first entries: the loading of the model."""
    entries = loop.plain["device_traces"][0]
    allocs = [at for at, entry in enumerate(entries) if entry["action"] == "alloc"]
    cut = loop.plain | {"device_traces": [entries[allocs[60] :]]}
    first, *_, last = (Ledger(step) for step in imported(as_pickle(cut), tmp_path))
    assert int(first.total[0]) > 0
    assert int(last.total[-1] - last.curve[Category.SLACK][-1]) == loop.end_bytes
    assert not last.unmatched_frees


# --- what it refuses --------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/gpumem-was-run",)


def refusal(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "snapshot"
    path.write_bytes(data)
    with pytest.raises(UserError) as refused:
        snapshot.read(path)
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_hostile_pickle_is_one_line_and_nothing_runs(tmp_path: Path, protocol: int) -> None:
    ran = Path("/tmp/gpumem-was-run")
    text = refusal(as_pickle({"segments": [], "device_traces": [], "x": Evil()}, protocol), tmp_path)
    assert "only plain containers are read" in text
    assert not ran.exists()


def test_only_the_opcodes_of_plain_containers_are_known(tmp_path: Path) -> None:
    """Of all others each is refused by its name, wherever it stands."""
    plain = {"PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
             "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINGET", "LONG_BINGET", "BINPUT",
             "LONG_BINPUT", "MEMOIZE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "DICT", "LIST", "TUPLE", "TUPLE1",
             "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS", "APPEND", "APPENDS"}  # fmt: skip
    for opcode in pickletools.opcodes:
        if opcode.name not in plain:
            data = b"\x80\x04" + opcode.code.encode("latin-1") + bytes(40)
            assert f"it asks for {opcode.name} at byte 2" in refusal(data, tmp_path)


def test_a_file_cut_off_anywhere_is_one_line(loop: Recorded, tmp_path: Path) -> None:
    for data in (as_pickle(loop.plain), json.dumps(loop.plain).encode()):
        for size in (0, 1, 2, 100, len(data) // 3, len(data) // 2, len(data) - 1):
            assert refusal(data[:size], tmp_path)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"hello", "it is neither a pickle nor JSON"),
        (b"{}", "it has neither segments nor traces"),
        (b'{"device_traces": 3}', "expected ["),
        (b'{"device_traces": [[{"action": "alloc"}]]}', "damaged"),
        (
            b'{"device_traces": [[{"action": "alloc", "addr": -1, "size": 4}]]}',
            "an entry's address, size, time or stream is no number",
        ),
        (b'{"segments": [{"device": 0, "address": 0, "total_size": 9, "blocks": [{"size": NaN}]}]}', "no number"),
        (b'{"segments": [[[[' + b"[" * 100_000, "RecursionError"),
        (pickle.dumps(3), "it holds no snapshot"),
        (pickle.dumps({"segments": [3]}), "it is no snapshot"),
        (b"\x80\x04\x8a\xff" + bytes(255) + b".", "a value of 255 bytes"),
        (b"\x80\x04X\xff\xff\xff\x7f", "a value of 2147483647 bytes"),
        (b"\x80\x04N\x72\xff\xff\xff\x00.", "its memo has gaps"),
        (b"\x80\x04h\x07.", "damaged at byte"),
        (b"\x80\x04a.", "damaged at byte"),
    ],
)
def test_what_is_no_snapshot_is_one_line(data: bytes, complaint: str, tmp_path: Path) -> None:
    assert complaint in refusal(data, tmp_path)


def test_a_small_file_cannot_ask_for_endless_work(tmp_path: Path) -> None:
    """The same list of blocks in ten thousand segments: shared in the file, and walked each it would take minutes."""
    blocks = [{"size": 512, "state": "active_allocated", "requested_size": 512, "frames": []}] * 10_000
    segment = {"device": 0, "address": 0, "total_size": 512, "stream": 0, "blocks": blocks}
    assert "more" in refusal(as_pickle({"segments": [segment] * 10_000, "device_traces": []}), tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bits=st.integers(1, 255), as_json=st.booleans())
def test_damage_anywhere_is_read_or_refused(loop: Recorded, tmp_path: Path, at: int, bits: int, as_json: bool) -> None:
    whole = loop.plain | {"device_traces": [loop.plain["device_traces"][0][:40]]}
    data = bytearray(json.dumps(whole).encode() if as_json else as_pickle(whole))
    data[at % len(data)] ^= bits
    path = tmp_path / "damaged"
    path.write_bytes(data)
    try:
        found = snapshot.read(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(step, StepTrace) for step in steps_of(found, 0))


def test_reading_tells_how_far_it_is_and_can_be_cancelled(loop: Recorded, tmp_path: Path) -> None:
    path, work = tmp_path / "snapshot", Work()
    path.write_bytes(as_pickle(loop.plain))
    snapshot.read(path, work)
    assert work.share == 1
    with pytest.raises(UserError, match="cancelled"):
        snapshot.read(path, Work(cancelled=True))


def test_a_large_pickle_takes_the_memory_of_its_entries(tmp_path: Path) -> None:
    """Twice the stack on every entry is twice the file and not one byte more in memory."""
    import tracemalloc

    def most(depth: int) -> tuple[int, int]:
        frames = [{"filename": f"f{i}.py", "line": i, "name": "forward"} for i in range(depth)]
        entries = [{"action": "alloc", "addr": 512 * i, "size": 512, "stream": 0, "time_us": i, "frames": list(frames)}
                   for i in range(5_000)]  # fmt: skip
        out = io.BytesIO()
        pickle.dump({"segments": [], "device_traces": [entries]}, out, protocol=4)
        path = tmp_path / f"{depth}.pickle"
        path.write_bytes(out.getvalue())
        del entries, out
        tracemalloc.start()
        snapshot.read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return path.stat().st_size, peak

    (small, held), (large, held_by_large) = most(20), most(80)
    assert large > 2 * small
    assert held_by_large < 1.25 * held + (large - small) // 8


def test_streams_and_private_pools_are_told_apart(tmp_path: Path) -> None:
    """Segments lie there as the snapshot is taken, or came and went before; the large one of stream 7 was there."""

    def entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
        return {"action": action, "addr": address, "size": size, "stream": stream, "time_us": 0, "frames": []}

    def segment(address: int, size: int, used: int, **more: Any) -> dict[str, Any]:
        state = {"state": "active_allocated", "frames": []}
        blocks = [state | {"address": address, "size": used, "requested_size": used - 12}] if used else []
        gap = {"address": address + used, "size": size - used, "requested_size": 0, "state": "inactive"}
        about = {"device": 0, "address": address, "total_size": size, "stream": 0, "segment_type": "large"}
        return about | {"blocks": [*blocks, gap]} | more

    mib = 1 << 20
    entries = [
        entry("segment_alloc", 100 * mib, 20 * mib),
        entry("alloc", 100 * mib, 4 * mib - 12),
        entry("segment_alloc", 200 * mib, 2 * mib, stream=7),
        entry("alloc", 200 * mib, 500, stream=7),
        entry("free_requested", 200 * mib, 500, stream=7),
        entry("free_completed", 200 * mib, 500, stream=7),
        entry("segment_free", 200 * mib, 2 * mib, stream=7),
        entry("alloc", 400 * mib, 1012),
    ]
    segments = [
        segment(100 * mib, 20 * mib, 4 * mib),
        segment(300 * mib, 30 * mib, 30 * mib, stream=7),
        segment(400 * mib, 2 * mib, 1024, segment_type="small", segment_pool_id=(0, 3)),
        segment(0, 2 * mib, 0, device=1, stream=9),
    ]
    path = tmp_path / "streams.json"
    path.write_text(json.dumps({"segments": segments, "device_traces": [entries]}))
    (trace,) = read(path)[0].traces()
    check(trace)
    large, side, private = AllocatorPool(0, "large"), AllocatorPool(7, "large"), AllocatorPool(0, "small", (0, 3))
    ledger, passing = Ledger(trace), AllocatorPool(7, "small")
    expected = [(large, 20 * mib, 4 * mib, 12), (side, 30 * mib, 30 * mib, 12), (private, 2 * mib, 1024, 12)]
    assert ledger.pools(3) == [*expected, (passing, 0, 0, 0)]
    assert ledger.pools(1)[-1] == (passing, 2 * mib, 512, 12) and ledger.pools(1)[2] == (private, 2 * mib, 0, 0)
    assert ledger.pools(-1)[0] == (large, 0, 0, 0), "its segment came with the first event"


# --- on our screens -----------------------------------------------------------------------


def test_open_shows_it_and_says_that_it_is_inferred(loop: Recorded, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(as_pickle(loop.plain))
    assert main(["open", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "snapshot"
    assert told["model"] == "PyTorch snapshot, categories inferred"
    assert told["now"]["optimizer_state"] == loop.state_bytes
    assert main(["open", str(path), "--once"]) == 0
    assert "categories inferred" in capsys.readouterr().out.splitlines()[0]


def test_open_refuses_a_hostile_one_in_one_line(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(as_pickle({"segments": [Evil()]}))
    assert main(["open", str(path), "--once"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpumem-tui: {path}: not read as a snapshot of PyTorch's memory: it asks for STACK_GLOBAL")
    assert error.count("\n") == 1


def test_a_snapshot_is_exported_like_any_run(loop: Recorded, tmp_path: Path) -> None:
    """So it gets the page, labels in memory_viz, and a recording's figures."""
    path, out = tmp_path / "snapshot.pickle", tmp_path / "run.json"
    path.write_bytes(as_pickle(loop.plain))
    assert main(["export", str(path), "-f", "json", "-o", str(out)]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert (run["kind"], run["step"]["ending"]) == ("imported", "complete")
    assert run["report"]["steps"][-1]["peak_bytes"] == run["peak"]["allocated_bytes"]


def test_a_snapshot_of_an_allocation_that_failed(loop: Recorded, tmp_path: Path) -> None:
    entries = loop.plain["device_traces"][0]
    failed = {"action": "oom", "size": 1 << 30, "device_free": 1 << 20, "stream": 0, "frames": [], "time_us": 0}
    path = tmp_path / "oom.pickle"
    path.write_bytes(as_pickle(loop.plain | {"device_traces": [[*entries, failed]]}))
    (run,) = read(path)
    (told,) = [event for event in run.events() if isinstance(event, OutOfMemory)]
    assert told.requested_bytes == 1 << 30
    assert run.ended is not None
    assert run.ended.reason == "failed"


# --- of a GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_its_allocators_count(tmp_path: Path) -> None:
    """By PyTorch's own recorder: the end to the byte, the peak but for remainders that were not split off."""
    path, record = tmp_path / "snapshot.pickle", torch.cuda.memory._record_memory_history
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    record(max_entries=1_000_000)
    try:
        model = nn.Sequential(nn.Embedding(512, 256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 512)).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(STEPS):
            ids = torch.randint(0, 512, (32, 128), device="cuda")
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
        allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        reserved = torch.cuda.memory_reserved()
    finally:
        record(None)
    (run,) = read(path)
    folded = [Ledger(trace) for trace in run.traces()]
    last = folded[-1]
    assert int(last.total[-1]) == allocated == run.gauge.allocated_bytes
    assert run.gauge.reserved_bytes == reserved
    pools = last.pools(len(last.trace.events) - 1)
    assert [sum(sizes) for sizes in zip(*(held[1:3] for held in pools), strict=True)] == [reserved, allocated]
    assert max(ledger.peak.bytes for ledger in folded) == pytest.approx(peak, rel=0.005)
    assert last.trace.step == STEPS
    parameters = sum(p.nbytes for p in model.parameters())
    states = [t for s in optimizer.state.values() for t in s.values() if t.is_cuda]
    assert last.end[Category.PARAMETERS] == parameters
    assert last.end[Category.OPTIMIZER_STATE] == sum(t.nbytes for t in states)
    after = last.after(Phase.BACKWARD)
    assert after is not None
    assert after[Category.GRADIENTS] == gradient_bytes
    write(tmp_path / "run.gpumem", [run])
    assert (tmp_path / "run.gpumem").stat().st_size <= path.stat().st_size / 10, "tiny: a large step is held to a 20th"
