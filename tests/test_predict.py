"""Predictions without a GPU: against figures measured on one, and against the CPU to the byte."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.events import Category, Phase
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.caching_allocator import CachingAllocator, OutOfMemoryError
from gpumem_tui.engine.prediction.gpus import Gpu, gpu, gpus, understand
from gpumem_tui.engine.prediction.outcome import Prediction, Verdict
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.predictor import Predictor
from gpumem_tui.engine.prediction.reduction import scratch_bytes
from gpumem_tui.engine.prediction.rehearsal import rehearse
from gpumem_tui.engine.prediction.search import largest, largest_that_fit
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.profiles import preset, run_fields
from gpumem_tui.tui import interrupt
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.commands import estimate
from gpumem_tui.tui.commands.estimate import verdict

from .conftest import Engine, small_run
from .terminal import until

GIB = 2**30
H100 = gpu("H100 80GB")
REFERENCE = preset("reference")
EXACT = 0.01
"""GiB: what the reference experiment's figures, given to three decimals, have to be met within."""


# --- the reference experiment -------------------------------------------------


@pytest.mark.parametrize("row", REFERENCE.rows, ids=lambda row: row.name)
def test_the_reference_experiment_is_predicted(row: Any) -> None:
    settings = techniques.parse(REFERENCE.settings, REFERENCE.where) | techniques.parse(row.settings, REFERENCE.where)
    predicted = predict(techniques.configure(run_fields(str(REFERENCE.model)), settings), H100)
    bare = row.bare_h100
    # The first row's process had no workspaces yet when its model was loaded.
    workspace = 0.064 if not bare["leftover"] else 0.0
    first_peak, second_peak = (step.peak_bytes for step in predicted.document.steps)
    assert predicted.loaded_bytes / GIB == pytest.approx(bare["loaded"] + workspace, abs=EXACT)
    assert predicted.after_step_bytes / GIB == pytest.approx(bare["after_step"], abs=EXACT)
    assert first_peak / GIB == pytest.approx(bare["peak_first_step"], abs=EXACT)
    assert max(first_peak, second_peak) / GIB == pytest.approx(bare["peak_all_steps"], abs=EXACT)
    assert bare["peak_all_steps"] * GIB < predicted.safe_bound_bytes <= 1.02 * predicted.peak_bytes
    assert predicted.document.unknown_bytes_max == 0


# --- the CPU --------------------------------------------------------------------


def test_a_prediction_sees_what_the_tracker_of_a_real_run_sees(engine: Engine) -> None:
    """The parts of a step in which CUDA does what a CPU does: weights, gradients, state, outputs."""
    config = small_run(optimizer="adamw-single")
    measured = engine.run(config)
    predicted = predict(config, H100).document.as_dict()
    for moment in ("loaded", "after_first_step"):
        real, guess = (document[moment]["by_category"] for document in (measured, predicted))
        for category in (Category.PARAMETERS, Category.BUFFERS, Category.GRADIENTS, Category.KV_CACHE):
            assert guess[category.key] == real[category.key], (moment, category)
        # AdamW counts its steps in tensors of 4 bytes on the host, which on a CPU is the device.
        steps = 4 * len(list_of_parameters(engine)) if moment == "after_first_step" else 0
        assert guess["optimizer_state"] + steps == real["optimizer_state"]
        assert guess["logits_loss"] == real["logits_loss"]


def list_of_parameters(engine: Engine) -> list[str]:
    trace = engine.traces[1]
    ledger = Ledger(trace)
    rows = ledger.blocks[ledger.blocks["category"] == Category.GRADIENTS]
    return sorted({trace.names[row["name"]] for row in rows})


def test_categories_sum_to_the_modelled_allocator_at_every_event() -> None:
    done = rehearse(small_run(checkpointing="layers", lora=True), H100)
    assert [trace.step for trace in done.traces] == [0, 1, 2]
    for trace, result in zip(done.traces[1:], done.steps, strict=True):
        ledger = Ledger(trace)
        assert ledger.unmatched_frees == 0
        assert int(ledger.total.max()) == result.peak_bytes
        assert sum(ledger.end.values()) == int(ledger.total[-1])
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert {span.phase for span in trace.phases} >= {Phase.FORWARD, Phase.RECOMPUTE, Phase.OPTIMIZER}
    assert len(done.recomputes) == 2 * 6


def test_answers_from_memory_are_those_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the cache of operators, event for event."""
    config = small_run(lora=True, quantization="nf4", checkpointing="layers")
    cached = rehearse(config, H100)
    monkeypatch.setattr(
        "gpumem_tui.engine.prediction.op_cache.OpCache.call", lambda _self, func, args, kwargs: func(*args, **kwargs)
    )
    asked = rehearse(config, H100)
    for one, other in zip(cached.traces, asked.traces, strict=True):
        for column in ("address", "bytes", "slack"):
            assert np.array_equal(one.events[column], other.events[column])


def test_nothing_of_a_prediction_stays_behind(engine: Engine) -> None:
    """A real run in the same process sees no patched function."""
    config = small_run(dtype="mixed")
    before = engine.run(config)
    predict(config, H100)
    with pytest.raises(UserError):
        predict(small_run(**{"lora": True, "lora.targets": "nothing_is_called_so"}), H100)
    after = engine.run(config)
    assert [step["peak_bytes"] for step in before["steps"]] == [step["peak_bytes"] for step in after["steps"]]
    with OpTracker():
        assert torch.tensor([1.0], device="cpu").item() == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        *({"optimizer": value} for value in ("adamw-fused", "adamw-8bit", "paged-adamw", "adafactor", "sgd-momentum")),
        *({"lora": True, "quantization": value} for value in ("nf4", "fp4", "int8")),
        {"dtype": "mixed", "attention": "eager"},
        {"checkpointing": "segments", "checkpointing.reentrant": True},
        {"accumulation": 2, "keep_outputs": False},
    ],
    ids=str,
)
def test_every_technique_is_predictable(settings: dict[str, Any]) -> None:
    predicted = predict(small_run(**settings), gpu("RTX 4090"))
    assert predicted.fits
    assert sum(predicted.by_category.values()) == predicted.peak_bytes < predicted.safe_bound_bytes
    assert predicted.by_category in predicted.by_phase.values()
    assert predicted.reserved_bytes >= predicted.peak_bytes
    assert predicted.document.unknown_bytes_max == 0


@pytest.mark.parametrize("settings", [{}, {"checkpointing": "layers"}, {"dtype": "mixed", "batch_size": 1}], ids=str)
def test_flash_attention_is_predicted_without_its_package(settings: dict[str, Any]) -> None:
    """PyTorch has the same kernel built in, and takes it where it can."""
    half = {"dtype": "bfloat16", **settings}
    own, built_in = (
        predict(small_run(attention=kind, **half), gpu("RTX 4090")) for kind in ("flash_attention_2", "sdpa")
    )
    assert own.peak_bytes == built_in.peak_bytes < predict(small_run(attention="eager", **half), H100).peak_bytes
    assert own.document.unknown_bytes_max == 0


def test_flash_attention_is_for_gpus_that_have_it() -> None:
    with pytest.raises(UserError, match=r"compute capability 8\.0: T4 16GB has not"):
        predict(small_run(attention="flash_attention_2", dtype="float16"), gpu("T4"))


def test_paged_state_is_outside_of_the_allocator() -> None:
    plain, paged = (predict(small_run(optimizer=kind), H100) for kind in ("adamw", "paged-adamw"))
    assert plain.managed_bytes == 0
    assert 0 < paged.managed_bytes < plain.by_category["optimizer_state"]
    assert paged.managed_bytes + paged.by_category["optimizer_state"] > plain.by_category["optimizer_state"] * 0.99


# --- the allocator --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expandable"), [("gpt2-h200", False), ("polyglot-expandable-h200", True)], ids=["native", "expandable"]
)
def test_a_real_trace_reserves_what_it_reserved(name: str, expandable: bool) -> None:
    """Three steps on an H200, every allocation and segment of the process in order: same bytes at every one."""
    with np.load(Path(__file__).parent / "data" / f"{name}.npz", allow_pickle=False) as trace:
        actions = trace["actions"][trace["action"]].tolist()
        addresses, sizes = trace["address"].tolist(), trace["size"].tolist()
    segments = iter([a for a, action in zip(addresses, actions, strict=True) if action == "segment_alloc"])
    allocator = CachingAllocator(expandable=expandable, place=None if expandable else lambda _: next(segments))
    where: dict[int, int] = {}
    reserved = 0
    for action, address, size in zip(actions, addresses, sizes, strict=True):
        if action in ("segment_alloc", "segment_map"):
            reserved += size
        elif action == "alloc":
            where[address], _ = allocator.allocate(size)
            assert allocator.reserved_bytes == reserved
            assert expandable or where[address] == address
        elif action == "free_requested":
            allocator.free(where.pop(address))
    assert allocator.peak_reserved_bytes == reserved > 7 * 10**9


def test_small_requests_share_a_segment_and_large_ones_have_their_own() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(700)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (512 + 1024, 2 << 20)
    allocator.allocate(3 << 20)
    assert allocator.reserved_bytes == (2 << 20) + (20 << 20)
    allocator.allocate((11 << 20) + 1)  # from what the last one left
    assert allocator.reserved_bytes == (2 << 20) + (20 << 20)
    allocator.allocate((31 << 20) + 1)
    assert allocator.reserved_bytes == (2 << 20) + (20 << 20) + (32 << 20)


def test_a_rest_that_is_too_small_is_handed_out_as_well() -> None:
    allocator = CachingAllocator()
    address, size = allocator.allocate((12 << 20) - 1000)
    assert size == 12 << 20
    assert allocator.free(address) == ((12 << 20) - 1000, 12 << 20)
    assert allocator.allocated_bytes == 0


def test_free_neighbours_are_merged_and_given_back_whole() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 << 20)[0] for _ in range(4)]
    for address in blocks:
        allocator.free(address)
    assert allocator.allocate(16 << 20)[0] == min(blocks)
    allocator.free(min(blocks))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0 < allocator.peak_reserved_bytes


def test_what_is_cached_is_given_back_before_memory_runs_out() -> None:
    allocator = CachingAllocator(capacity_bytes=40 << 20)
    address, _ = allocator.allocate(30 << 20)
    allocator.free(address)
    allocator.allocate(36 << 20)
    with pytest.raises(OutOfMemoryError):
        allocator.allocate(30 << 20)


def test_expandable_segments_reserve_page_by_page() -> None:
    fixed, expandable = CachingAllocator(), CachingAllocator(expandable=True)
    for allocator in (fixed, expandable):
        for size in (12, 30, 14, 50):
            allocator.allocate((size << 20) + 4096)
    assert expandable.reserved_bytes <= -(-(106 << 20) // (20 << 20)) * (20 << 20) + (20 << 20)
    assert expandable.allocated_bytes <= fixed.allocated_bytes


def test_the_scratch_of_a_split_reduction() -> None:
    """Measured on an H200: the gradient of a bias of 2048, summed over 4096 rows of float16."""
    grad = torch.empty(4096, 2048, dtype=torch.float16, device="meta")
    assert scratch_bytes(gpu("H200"), grad, [0]) == (67_108_864, 64)
    assert scratch_bytes(gpu("H200"), grad, [1]) == (0, 0)


# --- what is asked of predictions -------------------------------------------------


def test_the_largest_that_fits_is_found_in_few_questions() -> None:
    asked: list[int] = []

    def bound_at(n: int) -> int:
        asked.append(n)
        return 1000 + 37 * n

    assert (100_000 - 1000) // 37 * 63 // 64 <= largest(bound_at, 8, 100_000, 65_536) <= (100_000 - 1000) // 37
    assert len(asked) <= 5
    assert 179 <= largest(lambda n: 500 + 3 * n * n, 8, 100_000, 65_536) <= 182
    assert largest(lambda n: 37 * n, 8, 1000, 65_536) == 27
    assert largest(lambda _: 10, 8, 5, 100) == 0
    assert largest(lambda _: 1, 8, 5, 100) == 100


def test_gaps_between_blocks_are_part_of_the_one_verdict() -> None:
    """The smaller the GPU, the more has to be given back; what is allocated would fit in all but the smallest."""
    config = small_run()
    plenty = predict(config, H100)
    bound, gaps = plenty.safe_bound_bytes, plenty.reserved_bytes - plenty.peak_bytes

    def on(share_of_gaps: float) -> Prediction:
        available = int(bound + share_of_gaps * gaps)
        return predict(config, dataclasses.replace(H100, name="mine", memory_bytes=H100.context_bytes + available))

    found = {share: on(share) for share in (-0.01, 0.0, 0.7, 1.0)}
    assert [one.verdict for one in found.values()] == [
        Verdict.TOO_LARGE,
        Verdict.FRAGMENTED,
        Verdict.TIGHT,
        Verdict.FITS,
    ]
    assert [one.fits for one in found.values()] == [False, False, True, True]
    assert all(one.reserved_bytes == plenty.reserved_bytes for one in found.values())
    assert found[1.0].expandable_bytes is None
    assert plenty.peak_bytes < (found[0.7].expandable_bytes or 0) < plenty.reserved_bytes
    assert "MiB too little" in verdict(found[-0.01]) or "GiB too little" in verdict(found[-0.01])
    assert "gaps between blocks" in verdict(found[0.0]) and "It does not fit" in verdict(found[0.0])
    assert "tightly" in verdict(found[0.7]) and "expandable_segments:True it would be" in verdict(found[0.7])
    assert "the allocator reserves" in verdict(found[1.0])


def test_the_largest_batch_that_fits_is_one_that_fits_with_its_gaps() -> None:
    card = gpu("RTX 3060:2GiB")
    now = predict(small_run(), card)
    found = largest_that_fit(now, lambda config: predict(config, card))["max_batch_size"]
    assert predict(small_run(batch_size=found), card).fits


def test_gpus_are_found_by_what_people_call_them() -> None:
    assert gpu("h100 80gb") is gpu("H100-80GB") is gpu("H10080GB") is gpu("H100") is H100
    assert gpu("4090").capability == (8, 9)
    assert all(card.memory_bytes > 8 * GIB and card.multiprocessors > 20 for card in gpus().values())
    with pytest.raises(UserError, match="did you mean"):
        gpu("H1000")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090 24GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("Tesla T4", "T4 16GB"),
    ],
)
def test_gpus_are_found_by_what_their_driver_calls_them(reported: str, name: str) -> None:
    assert understand(reported) == (gpus()[name], "")


def test_a_driver_s_word_for_another_gpu_is_not_taken_for_noise() -> None:
    with pytest.raises(UserError, match="did you mean RTX 4090 24GB"):
        gpu("NVIDIA GeForce RTX 4090 Laptop GPU")


def test_of_several_gpus_it_is_the_smallest_and_that_is_said() -> None:
    assert understand("A100") == (
        gpus()["A100 40GB"],
        "A100: taken for the A100 40GB, the smallest of A100 80GB, A100 40GB",
    )
    assert understand("A100 80GB") == (gpus()["A100 80GB"], "")


def test_a_size_is_a_gpu_of_that_size_of_the_newest_generation_and_that_is_said() -> None:
    assert understand("24GB") == (
        gpus()["RTX 4090 24GB"],
        "24GB: taken for the RTX 4090 24GB, the newest generation of this size",
    )
    assert gpu("141 GB") is gpu("H200")
    between = understand("20GB")
    assert (between.gpu.memory_bytes, between.gpu.capability) == (20 * GIB, (8, 9))
    assert between.said == "20GB: taken for RTX 4090 24GB with 20 GiB"
    with pytest.raises(UserError, match="no GPU known here has this much memory"):
        gpu("500GB")


def test_a_gpu_s_memory_may_be_given_after_a_colon() -> None:
    some = gpu("RTX 4090:20GiB")
    assert some == dataclasses.replace(gpu("RTX 4090"), name="RTX 4090 24GB:20GiB", memory_bytes=20 * GIB)
    assert gpu(some.name) == some
    for wrong in ("A100:", "A100:20", "A100:nanGB", "A100:0GB"):
        with pytest.raises(UserError, match="after the colon comes how much memory there is"):
            gpu(wrong)


# --- the command line -----------------------------------------------------------


def test_estimate_writes_the_document_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "estimate.json"
    quick = ["--batch-size", "2", "--seq-len", "1024"]
    assert main(["estimate", "--profile", "tiny", *quick, "--gpu", "H200", "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    assert document["schema"] == "gpumem-run/1"
    assert document["predicted"] is True
    assert document["gpu"] == "H200"
    assert document["fits"] is True
    assert document["margin_bytes"] > 0
    assert document["safe_bound_bytes"] > document["peak"]["allocated_bytes"]
    assert document["max_batch_size"] > 100
    assert document["max_sequence_length"] == 2048  # what the model was made for
    assert "fits" in capsys.readouterr().out


def test_an_estimate_says_its_batch_and_what_surprises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--profile", "tiny", "--preset", "qlora", "--gpu", "L4 24GB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("tiny batch_size=8 seq_len=256 dtype=mixed")
    assert "K-bit preparation makes embeddings, head and norms float32" in said


def test_rows_longer_than_a_model_was_made_for_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--profile", "tiny", "--batch-size", "1", "--seq-len", "3000", "--gpu", "L4"]) == 0
    assert "3000 tokens in a row: the model was made for 2048." in capsys.readouterr().out


def test_the_calculator_has_a_row_for_each_data_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--profile", "tiny", "--table", "--json", "-", "--gpu", "L4 24GB"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["batch_size"], document["seq_len"]) == (8, 256)
    rows = {row["dtype"]: row for row in document["rows"]}
    assert list(rows) == ["float32", "float16/bfloat16", "int8", "int4"]
    assert rows["float32"]["weights_bytes"] == pytest.approx(2 * rows["float16/bfloat16"]["weights_bytes"], rel=0.01)
    assert rows["int4"]["weights_bytes"] < rows["int8"]["weights_bytes"] < rows["float16/bfloat16"]["weights_bytes"]
    assert rows["int4"]["training_adam_bytes"] is None
    assert rows["float32"]["lora_bytes"] < rows["float32"]["training_adam_bytes"]


def test_an_estimate_says_the_answer_first_and_keeps_it_when_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the largest batch is searched: what was said stands, and is in the document."""
    said: list[str] = []

    def left(*_: object) -> None:
        said.append(capsys.readouterr().out)
        interrupt._interrupted()

    monkeypatch.setattr(estimate, "largest_that_fit", left)
    monkeypatch.setattr(estimate, "end", lambda: sys.exit(interrupt.INTERRUPTED))
    target = tmp_path / "estimate.json"
    with pytest.raises(SystemExit, match="130"):
        main(["estimate", "--batch-size", "2", "--seq-len", "16", "--gpu", "H200", "--json", str(target)])
    assert "It fits in the" in said[0] and "Largest" not in said[0] + capsys.readouterr().out
    document = json.loads(target.read_text())
    assert document["peak"]["allocated_bytes"] > 0 and "max_batch_size" not in document


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--profile", "tiny", "--gpu", "Voodoo 2"], "--gpu Voodoo 2"),
        (["--profile", "tiny", "--gpu", ""], "not a GPU known here"),
        (["--model", "."], ".: Unrecognized model"),
        (["--profile", "tiny", "--set", "quantization=nf4"], "lora=on"),
        (["--profile", "tiny", "--json", "/nowhere/x.json"], "cannot write there"),
    ],
    ids=["gpu", "no name", "folder without a config", "combination", "json"],
)
@pytest.mark.parametrize("command", ["estimate", "advise"])
def test_what_cannot_be_is_one_clear_line(
    command: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpumem-tui: ") and error.count("\n") == 1
    assert says in error


def test_only_the_config_of_a_folder_is_read(tmp_path: Path) -> None:
    from gpumem_tui.profiles import model_profile

    fields = dict(model_profile("tiny").config) | {"architectures": ["GPTNeoXForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    base = {"model": str(tmp_path), "pretrained": True}
    from_folder = predict(small_run(base), H100)
    assert from_folder.peak_bytes == predict(small_run(), H100).peak_bytes


# --- in the background ------------------------------------------------------------


def test_a_process_of_its_own_predicts_in_the_background() -> None:
    predictor = Predictor(H100)
    try:
        wanted = [small_run(), small_run(lora=True)]
        assert predictor.get(wanted[0]) is None
        predictor.want(wanted)
        assert predictor.wait(90)
        answers = [predictor.get(config) for config in wanted]
        assert all(not isinstance(answer, UserError | None) for answer in answers)
        here = predict(wanted[1], H100)
        assert answers[1].peak_bytes == here.peak_bytes  # type: ignore[union-attr]
        assert answers[1].by_category == here.by_category  # type: ignore[union-attr]
        # What does not decide the memory is no other question.
        assert predictor.get(dataclasses.replace(wanted[0], steps=7, seed=3)) is answers[0]
        impossible = small_run(**{"lora": True, "lora.targets": "nothing_is_called_so"})
        predictor.want([impossible])
        assert predictor.wait(60)
        assert isinstance(predictor.get(impossible), UserError)
    finally:
        predictor.close()


def test_what_is_no_longer_wanted_is_never_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    begun: list[int] = []
    go, first = threading.Event(), threading.Event()

    def ask(_self: Predictor, config: RunConfig) -> Any:
        begun.append(config.batch_size)
        first.set()
        go.wait()
        return UserError("pretended")

    monkeypatch.setattr(Predictor, "_ask", ask)
    predictor = Predictor(H100)
    predictor.want([small_run(batch_size=n) for n in (1, 2, 3)])
    first.wait()
    predictor.want([small_run(batch_size=4)])
    go.set()
    assert predictor.wait(30)
    predictor.close()
    assert begun == [1, 4]


def test_what_nobody_waits_for_waits_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def ask(_self: Predictor, config: RunConfig) -> Any:
        begun.append(config.batch_size)
        return UserError("pretended")

    monkeypatch.setattr(Predictor, "_ask", ask)
    monkeypatch.setattr("gpumem_tui.engine.prediction.predictor.UNHURRIED_SHARE", 1e-12)
    monkeypatch.setattr("gpumem_tui.engine.prediction.predictor.LONGEST_REST_S", 3600.0)
    predictor = Predictor(H100)
    unhurried = small_run(batch_size=2)
    predictor.want([], [small_run(batch_size=1), unhurried])
    until(lambda: predictor.get(small_run(batch_size=1)))
    for hurried in (small_run(batch_size=4), small_run(batch_size=5)):
        predictor.want([hurried], [unhurried])
        until(lambda wanted=hurried: predictor.get(wanted))
    predictor.close()
    assert begun == [1, 4, 5], "after each answer it rests, and what somebody waits for ends the rest"
    assert predictor.get(unhurried) is None


def test_layers_that_are_dropped_at_random_are_kept(tmp_path: Path) -> None:
    """OPT asks a random number for each layer whether to skip it; what is drawn is what is expected of it."""
    fields = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "vocab_size": 512}
    fields |= {"num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 64, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"layerdrop": 0.1}))
    predicted = predict(small_run({"model": str(tmp_path), "pretrained": True}), H100).document.as_dict()[
        "after_first_step"
    ]
    assert predicted["by_category"]["gradients"] == predicted["by_category"]["parameters"]


def test_asking_loads_no_torch() -> None:
    import subprocess

    code = (
        "import sys, gpumem_tui.engine.prediction.predictor, gpumem_tui.engine.prediction.advice;"
        "import gpumem_tui.tui.commands.estimate, gpumem_tui.tui.commands.advise;"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_gpu_is_plain_data() -> None:
    card = Gpu("mine", 24 << 30, (8, 9), 128, 1536)
    assert predict(small_run(), card).gpu == "mine"
