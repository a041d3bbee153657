"""On a CUDA device: the reference experiment, and the caching allocator's own word for every sum."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.allocator_settings import MIN_BLOCK_BYTES
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.device import environment
from gpumem_tui.engine.events import EVENT, MARK, OWNER, AllocatorPool, Phase, StepTrace
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.out_of_memory.pools import pool_of
from gpumem_tui.engine.run_events import Note, OutOfMemory, RunEnded, RunFailed, StepEnded
from gpumem_tui.engine.trace_check import check as check_trace
from gpumem_tui.engine.tracing.allocator_trace import AllocatorTrace
from gpumem_tui.engine.tracing.recorder import Seen
from gpumem_tui.engine.weights.quantizable import quantizable_modules
from gpumem_tui.engine.weights.random_weights import random_model
from gpumem_tui.engine.weights.schemes import registry
from gpumem_tui.profiles import PresetRow, model_profile, preset, run_fields

from . import watching
from .conftest import Engine, small_run, wait_until
from .test_techniques import GPU_PAIRS, GPU_SINGLES, check, runs_on

pytestmark = pytest.mark.gpu

GIB = 2**30

REFERENCE = preset("reference")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine("cuda")
    yield made
    made.session.close()


def row_config(row: PresetRow) -> RunConfig:
    settings = techniques.parse(REFERENCE.settings, REFERENCE.where) | techniques.parse(row.settings, REFERENCE.where)
    return replace(techniques.configure(run_fields(str(REFERENCE.model)) | {"device": "cuda"}, settings), trace="every")


@pytest.fixture(scope="module", params=REFERENCE.rows, ids=lambda row: row.name)
def reference(request: pytest.FixtureRequest, engine: Engine) -> tuple[PresetRow, dict[str, Any]]:
    return request.param, engine.run(row_config(request.param))


def test_after_the_step_within_5_mib_of_the_bare_run(reference: tuple[PresetRow, dict[str, Any]]) -> None:
    row, document = reference
    after_step = document["after_first_step"]["allocated_bytes"] / GIB
    assert after_step == pytest.approx(row.bare_h100["after_step"], abs=0.005)


def test_the_peak_within_one_percent_of_the_bare_run(reference: tuple[PresetRow, dict[str, Any]]) -> None:
    row, document = reference
    assert document["peak"]["allocated_bytes"] / GIB == pytest.approx(row.bare_h100["peak_all_steps"], rel=0.01)


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4-double", True)])
def test_quantized_weights_take_what_the_lens_says(engine: Engine, kind: str, double: bool) -> None:
    """To the allocator's rounding: codes, scales, tables and a mean are blocks of their own."""
    profile = model_profile("tiny")
    weights = random_model(profile.config, profile.dtype)
    modules = quantizable_modules(profile.config) or ()
    quantized = [tensor for tensor in weights.tensors if tensor.name.removesuffix(".weight") in modules]
    run = engine.run(small_run(lora="on", quantization="nf4", quantization__double=double, lora__r=1))
    said = sum(registry()[kind].storage_bytes(*tensor.shape) for tensor in quantized)
    rest = 4 * (run["parameters"] - sum(math.prod(tensor.shape) for tensor in quantized))  # float32
    blocks = (6 if double else 3) * len(quantized) + weights.vectors + len(weights.tensors) + 2 * len(quantized)
    assert 0 <= run["loaded"]["by_category"]["parameters"] - said - rest < MIN_BLOCK_BYTES * blocks


def test_gradients_and_optimizer_state_are_exact(reference: tuple[PresetRow, dict[str, Any]]) -> None:
    """Closed forms; a CUDA AdamW keeps its step counters on the CPU."""
    row, document = reference
    after = document["after_first_step"]["by_category"]
    trained = document["trainable_parameters"]
    size = 4 if document["config"]["options"]["lora"] else 2  # PEFT keeps adapters in float32
    assert after["gradients"] == size * trained
    if document["config"]["options"]["optimizer"] == "adamw":
        assert after["optimizer_state"] == 2 * size * trained
    else:
        state = after["optimizer_state"] + document["managed_bytes"]
        assert state / GIB == pytest.approx(row.bare_h100["optimizer"], abs=0.001)


def test_nothing_is_unknown_and_nothing_leaks(reference: tuple[PresetRow, dict[str, Any]]) -> None:
    _, document = reference
    assert document["unknown_bytes_max"] == 0
    assert document["leaked_bytes"] == 0


def test_the_sizes_of_the_1_3b_model(engine: Engine) -> None:
    plain = engine.run(row_config(REFERENCE.rows[0]))
    assert plain["parameters"] == 1_331_810_304
    assert plain["loaded"]["by_category"]["parameters"] == 2_663_620_608
    assert plain["after_first_step"]["by_category"]["optimizer_state"] == 5_327_241_216
    cache = 2 * 24 * 4 * 256 * 2048 * 2
    assert plain["after_first_step"]["by_category"]["kv_cache"] == cache


@pytest.mark.filterwarnings("ignore")  # a compiler warns of what it finds, and of itself
@pytest.mark.parametrize("settings", [*GPU_SINGLES, *GPU_PAIRS], ids=str)
def test_what_needs_a_gpu_runs_on_one(engine: Engine, settings: dict[str, Any]) -> None:
    if not runs_on(settings, environment(torch.device("cuda"))):
        pytest.skip("a package of it is not installed")
    check(engine, settings)


def test_the_step_whose_operators_are_watched_takes_no_more_than_the_next(engine: Engine) -> None:
    """A tied embedding has two gradients, which are added up in place there too."""
    settings = {"optimizer": "sgd", "loss": "chunked", "checkpointing": "layers", "kv_cache": "off", "steps": 4}
    document = engine.run(small_run(run_fields("gpt2"), **settings))
    _, watched, *others = [step["peak_bytes"] for step in document["steps"]]
    assert others == [watched, watched]


def test_paged_state_has_a_ledger_of_its_own(engine: Engine) -> None:
    """Managed memory is in no counter of torch's; small tensors are not paged, and that is said."""
    config = techniques.parse({"optimizer": "paged-adamw", "batch_size": 2, "steps": 2, "dtype": "float16"}, "test")
    large = engine.run(techniques.configure(run_fields("polyglot-ko-1.3b"), config))
    assert large["managed_bytes"] == 10_649_337_856
    small = engine.run_events(small_run(optimizer="paged-adamw", lora="on"))
    assert any("nothing was paged" in m.text for m in small if isinstance(m, Note))


def pools_in(segments: list[dict[str, Any]]) -> dict[AllocatorPool, tuple[int, int, int]]:
    """Bytes reserved, allocated and beyond what was asked for, of each pool in a snapshot of PyTorch's."""
    found: dict[AllocatorPool, tuple[int, int, int]] = {}
    for segment in segments:
        used = [block for block in segment["blocks"] if block["state"] == "active_allocated"]
        allocated = sum(block["size"] for block in used)
        sizes = segment["total_size"], allocated, allocated - sum(block["requested_size"] for block in used)
        before = found.get(pool_of(segment), (0, 0, 0))
        found[pool_of(segment)] = tuple(map(operator.add, before, sizes))  # type: ignore[assignment]
    return found


def pools_at_the_end(trace: StepTrace) -> dict[AllocatorPool, tuple[int, int, int]]:
    """Likewise of each pool that holds something as a trace ends."""
    pools = Ledger(trace).pools(len(trace.events) - 1)
    return {pool: tuple(sizes) for pool, *sizes in pools if sizes[0]}  # type: ignore[misc]


@pytest.mark.parametrize(
    "settings",
    [{"checkpointing": "layers", "accumulation": 2}, {"offload": "activations", "offload.stream": True}],
    ids=str,
)
def test_the_blocks_are_the_allocators_own_when_a_step_ends(
    engine: Engine, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own snapshot, taken where the trace is read: the same blocks, and the same sums of every pool."""
    engine.run(small_run())
    recorder = engine.session._recorder
    assert recorder is not None
    drain = recorder.drain
    taken: list[tuple[int, list[tuple[int, int]], dict[AllocatorPool, tuple[int, int, int]]]] = []

    def drained() -> Any:
        segments = torch.cuda.memory_snapshot()
        blocks = [
            (block["address"], block["requested_size"], block["size"])
            for segment in segments
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        ]
        assert sum(size for *_, size in blocks) == torch.cuda.memory_allocated()
        known = sorted((address, asked) for address, asked, _ in blocks)
        taken.append((torch.cuda.memory_allocated(), known, pools_in(segments)))
        return drain()

    monkeypatch.setattr(recorder, "drain", drained)
    assert engine.run(small_run(**settings, steps=3))["failure"] is None
    assert len(engine.traces) == len(taken) == 4
    for trace, (allocated, blocks, pools) in zip(engine.traces, taken, strict=True):
        ledger = Ledger(trace)
        alive = ledger.alive(len(trace.events) - 1)
        assert sorted(zip(alive["address"].tolist(), alive["bytes"].tolist(), strict=True)) == blocks
        assert int(ledger.total[-1]) == allocated
        assert pools_at_the_end(trace) == pools
    if settings.get("offload.stream"):
        assert len({pool.stream for pool in taken[-1][-1]}) == 2


def test_out_of_memory_ends_the_run_and_says_what_filled_the_gpu(engine: Engine) -> None:
    """Batch and sequence far beyond any info; the run before is started again."""
    huge = run_fields("polyglot-ko-1.3b")
    settings = {"batch_size": 512, "seq_len": 2048, "rows": 512, "steps": 1}
    milestones = engine.run_events(techniques.configure(huge, techniques.parse(settings, "test")))
    assert OutOfMemory in [type(m) for m in milestones], [m.text for m in milestones if isinstance(m, RunFailed)]
    told = next(m for m in milestones if isinstance(m, OutOfMemory))
    assert told.phase == "forward"
    assert told.requested_bytes > 1 << 30
    ended = next(m for m in milestones if isinstance(m, RunEnded))
    assert ended.leaked_bytes == 0


def test_the_device_reconciles_with_nvml(engine: Engine) -> None:
    """Used by the process = reserved + context, measured early in the run; less than 16 MiB is left.

    Managed memory is counted to the device and to no process, and it is given back when the run ends.
    """
    settings = {"steps": 40, "batch_size": 4, "seq_len": 256, "dtype": "float16", "optimizer": "paged-adamw-8bit"}
    engine.run(techniques.configure(run_fields("polyglot-ko-1.3b"), techniques.parse(settings, "test")))
    gauge = engine.session.run.training_gauge
    assert gauge is not None and gauge.step > 3
    if gauge.process_bytes is None:
        pytest.skip("NVML sees no processes here")
    assert gauge.reserved_bytes is not None and gauge.context_bytes is not None and gauge.managed_bytes > GIB
    assert gauge.allocated_bytes <= gauge.reserved_bytes
    assert 0.1 * GIB < gauge.context_bytes < 2 * GIB
    assert gauge.unaccounted_bytes is not None
    assert abs(gauge.unaccounted_bytes) < 16 * 2**20
    after = engine.session._publisher.read_gauge()
    assert after.managed_bytes == 0
    assert gauge.device_used_bytes is not None and after.device_used_bytes is not None
    given_back = gauge.device_used_bytes - after.device_used_bytes
    assert given_back == pytest.approx(gauge.reserved_bytes + gauge.managed_bytes, rel=0.05)


def test_a_long_step_is_shown_while_it_goes_on(engine: Engine) -> None:
    """A step of more than a second is read inside: the bars move, and nothing is lost by it."""
    settings = {"steps": 3, "batch_size": 8, "seq_len": 256, "dtype": "float16", "accumulation": 40}
    config = techniques.configure(run_fields("polyglot-ko-1.3b"), techniques.parse(settings, "test"))
    partial: list[StepTrace] = []
    feed = engine.session._feed
    feed._on_trace = lambda trace: partial.append(trace) if trace.is_open else engine._seen(trace)
    try:
        engine.run(replace(config, trace="every"))
    finally:
        feed._on_trace = engine._seen
    assert {trace.step for trace in partial} >= {2, 3}
    for trace in engine.traces[1:]:
        ledger = Ledger(trace)
        assert trace.counted is not None
        assert ledger.peak.bytes == trace.counted.peak_bytes
        assert int(ledger.total[-1]) == trace.counted.end_bytes
        assert not ledger.curve[Category.UNKNOWN].any()


def test_activations_under_checkpointing_are_one_input_a_layer(engine: Engine) -> None:
    settings = {"batch_size": 4, "seq_len": 256, "steps": 1, "checkpointing": "layers", "kv_cache": "off"}
    config = techniques.configure(run_fields("polyglot-ko-1.3b"), techniques.parse(settings, "test"))
    engine.run(replace(config, trace="every"))
    ledger = Ledger(engine.traces[-1])
    end_of_forward = next(s.end for s in ledger.trace.phases if s.phase.name == "FORWARD") - 1
    saved = ledger.by_name(end_of_forward, Category.ACTIVATIONS)
    one_input = 2 * 4 * 256 * 2048
    assert sum(saved.values()) == pytest.approx(24 * one_input, rel=0.15)


async def test_toggling_in_the_app_on_a_gpu() -> None:
    """The real app on the real engine: LoRA, then QLoRA, then checkpointing, each restarting the run."""
    from gpumem_tui.engine.feed import Start
    from gpumem_tui.engine.session import Session
    from gpumem_tui.tui.app import GpumemApp

    session = Session("cuda")
    app = GpumemApp(session, refresh_hz=0)
    settings = {"batch_size": 8, "rows": 64}
    session.command(Start(techniques.configure(run_fields("polyglot-ko-1.3b"), techniques.parse(settings, "test"))))

    def trained(run: int) -> bool:
        return any(isinstance(m, StepEnded) and m.run == run and m.step >= 3 for m in session.events(0))

    async with app.run_test(size=(80, 24)) as pilot:
        for run, key in enumerate((None, "l", "u", "k"), 1):
            if key:
                await pilot.press(key)
            wait_until(lambda n=run: trained(n), session)  # type: ignore[misc]
            app.tick()
            await pilot.pause()
    session.close()
    config = session.run.config
    assert config is not None
    assert (config["lora"], config["quantization"], config["checkpointing"]) == (True, "nf4", "layers")
    ended = [m for m in session.events(0) if isinstance(m, RunEnded)]
    assert [m.leaked_bytes for m in ended] == [0, 0, 0, 0]


def test_cudnns_dropout_state_is_cudnns_in_a_watched_run(seen: watching.Seen) -> None:
    from gpumem_tui.engine.tracing.owners import DROPOUT_STATE
    from gpumem_tui.watch import watch

    layer = torch.nn.LSTM(64, 64, 2, dropout=0.1, device="cuda")
    optimizer = torch.optim.Adam(layer.parameters())
    with watch(layer, optimizer):
        for _ in range(3):
            layer(torch.ones(8, 4, 64, device="cuda"))[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger, card = seen.ledgers[-1], torch.cuda.get_device_properties(0)
    held = {c: ledger.by_name(len(ledger.trace.events) - 1, c).get(DROPOUT_STATE, 0) for c in Category}
    assert held.pop(Category.WORKSPACE) == card.multi_processor_count * card.max_threads_per_multi_processor * 24
    assert not any(held.values())


def test_a_trainer_run_of_the_1_3b_model_with_lora_is_watched_to_the_byte(tmp_path: Any) -> None:
    """A `transformers.Trainer` of one's own, on a device that was in use before: every event has a name.

    The sums are the allocator's own at the end of every step and after the optimizer; its peak is the script's.
    Between those its counter is read after every module in forward and before every module's gradient goes on:
    the ledger's sums go through the very same numbers in the same order.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    from gpumem_tui.engine.train import StepResult
    from gpumem_tui.engine.watch.leftovers import SCRIPT
    from gpumem_tui.engine.watch.watched_source import WatchedSource
    from gpumem_tui.profiles import model_profile
    from gpumem_tui.watch import MemoryCallback

    profile = model_profile("polyglot-ko-1.3b")
    in_use = torch.ones(1 << 20, device="cuda") @ torch.ones(1 << 20, device="cuda")  # cuBLAS has its workspace
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**profile.config), dtype=torch.float16)
    model = get_peft_model(model, LoraConfig(target_modules=["query_key_value"]))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(100, 30_000, (64, 256))]
    counted: list[int] = []

    def count(*_: Any) -> None:
        counted.append(torch.cuda.memory_allocated())

    def leave(_module: Any, _inputs: Any, output: Any) -> None:
        count()
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(count)

    for module in model.modules():
        module.register_forward_hook(leave)
    traces: list[StepTrace] = []
    ends: dict[int, int] = {}
    callback = MemoryCallback(every_step=True)
    good = WatchedSource.publish

    def publish(self: WatchedSource, trace: StepTrace) -> None:
        good(self, trace)
        latest = self.run.latest if self.run is not None else None
        if latest is not None and not trace.is_open:
            traces.append(latest)

    def stepped(self: WatchedSource, result: StepResult) -> None:
        ends[result.step] = result.allocated_bytes
        told(self, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchedSource, "publish", publish)
        told = WatchedSource.stepped
        patch.setattr(WatchedSource, "stepped", stepped)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=5, per_device_train_batch_size=8, gradient_accumulation_steps=2, report_to=[],
            disable_tqdm=True, save_strategy="no", max_grad_norm=1.0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert in_use.item() > 0
    assert [trace.step for trace in traces][:5] == [1, 2, 3, 4, 5]
    for trace in traces[:5]:
        ledger = Ledger(trace)
        assert ledger.unmatched_frees == 0
        assert ledger.curve[Category.UNKNOWN].max() == 0
        after = ledger.after(Phase.OPTIMIZER)
        assert after is not None and sum(after.values()) == ends[trace.step]
        assert trace.counted is not None and trace.counted.end_bytes == int(ledger.total[-1])
        held = ledger.by_name(len(trace.events) - 1, Category.HELD_BY_SCRIPT)
        # The next batches, the average of the loss, the norm: kilobytes, beside a model of gigabytes.
        assert held.get(SCRIPT, 0) < 1 << 23
        assert trace.micro_batches == 2
    sums = iter(np.concatenate([Ledger(trace).total for trace in traces[:5]]).tolist())
    assert len(counted) > 5 * 2 * 500
    # Where nothing happened in between, the counter is read twice; else each is looked for behind the one before.
    assert all(number in sums for number, _ in groupby(counted))
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    last = Ledger(traces[4]).after(Phase.OPTIMIZER)
    assert last is not None
    assert last[Category.GRADIENTS] == adapters
    assert 2 * adapters <= last[Category.OPTIMIZER_STATE] <= 2 * adapters + 512 * 2 * 96


def test_streams_and_private_pools_are_told_apart_as_the_allocator_does() -> None:
    """Blocks of two streams and of a `MemPool`, given up while the other stream is at them, read in two parts.

    The last test here: this thread's workspace of cuBLAS stays, which the engine of the others knows nothing of.
    """
    device, side, private = torch.device("cuda", 0), torch.cuda.Stream(), torch.cuda.MemPool()
    torch.cuda.empty_cache()
    recorder = AllocatorTrace(device)
    begin = recorder.alive(recorder.start())
    parts = [Seen(np.empty(0, EVENT), begin.segments)]
    for round_ in range(2):
        with torch.cuda.stream(side):
            lent = [torch.empty(size, device=device) for size in (1000, 3 << 20, (11 << 20) - 300)]
            lent[1].add_(1)
        torch.cuda.current_stream().wait_stream(side)
        for tensor in lent:
            torch.cuda._sleep(1_000_000)
            tensor.record_stream(torch.cuda.current_stream())
        with torch.cuda.use_mem_pool(private):
            kept = [torch.empty(size, device=device) for size in (700, (6 << 20) + round_)]
        held = [torch.empty((1 << 20) + 700 * n, device=device) for n in range(4)]
        del lent[1], kept[0], held[:2]
        seen = recorder.events(recorder.drain())
        seen.segments["event"] += sum(len(part.rows) for part in parts)
        parts.append(seen)
        events, segments = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        events["mark"] = 0
        segments["event"] = np.minimum(segments["event"], len(events) - 1)
        trace = StepTrace(1, events, np.zeros(1, MARK), begin.rows, np.empty(0, OWNER), ("",), (),
                          segments=segments, pools=recorder.pools)  # fmt: skip
        check_trace(trace)
        expected = pools_in(torch.cuda.memory_snapshot())
        assert pools_at_the_end(trace) == expected
        assert {0, side.cuda_stream} <= {pool.stream for pool in expected}
        assert sum(any(pool.private) for pool in expected) == 2, "a small pool and a large one"
    recorder.stop()
    torch.cuda.synchronize()
    del lent, kept, held, private
    torch.cuda.empty_cache()
