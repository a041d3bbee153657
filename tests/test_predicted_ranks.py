"""Predictions of a job's ranks: over a fake process group, held against real ranks on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.events import Environment, Phase
from gpumem_tui.engine.feed import End, Save, Start
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.parallelism import zero
from gpumem_tui.engine.prediction import fake_zero3, job
from gpumem_tui.engine.prediction.fake_ddp import Piece, buckets
from gpumem_tui.engine.prediction.fewest_gpus import fewest_gpus
from gpumem_tui.engine.prediction.gpus import gpu, gpu_of, understand
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.prediction_store import key_of
from gpumem_tui.engine.prediction.rehearsal import rehearse
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import Saved
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.commands import estimate

from .app_driver import foretold
from .conftest import small_run
from .terminal import until
from .test_layer_extrapolation import assert_same, run_of
from .viewing import Viewers

H100 = gpu("H100 80GB")
PER_RANK = (
    Category.PARAMETERS,
    Category.GRADIENTS,
    Category.OPTIMIZER_STATE,
    Category.GATHERED,
    Category.COMMUNICATION,
)


def job_of(ranks: int, model: str = "tiny", **settings: Any) -> RunConfig:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return techniques.configure(
        run_fields(model), techniques.parse({"batch_size": 2, "seq_len": 16, "parallel.ranks": ranks} | named, "test")
    )


def held_at(run: Run) -> dict[str, dict[str, int]]:
    """Bytes of what ranks have each their part of: loaded, and from the second step on as phases end.

    Gloo's threads may still hold what they have sent when others go on, all the more on a busy
    machine. That adds to what is held and takes nothing away: of several moments the least counts.
    """
    found: dict[str, dict[str, int]] = {}
    for trace in run.traces():
        ledger = Ledger(trace)
        if trace.step == 0:
            ours = set(Category) - {Category.WORKSPACE, Category.SLACK}  # of a GPU only
            found["loaded"] = {c.key: 0 for c in PER_RANK} | {"parameters": sum(ledger.end[c] for c in ours)}
        elif trace.step == 1:
            found["loaded"]["parameters"] = min(found["loaded"]["parameters"], int(trace.begin["bytes"].sum()))
        else:
            ends = {span.phase: ledger.at(span.end - 1) for span in trace.phases if span.phase != Phase.IDLE}
            for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.ZERO_GRAD):
                sizes = {c.key: ends[phase].get(c, 0) for c in PER_RANK}
                least = found.setdefault(phase.name, sizes)
                found[phase.name] = {key: min(size, least[key]) for key, size in sizes.items()}
    return found


def test_two_real_ranks_hold_what_was_predicted_to_the_byte(viewers: Viewers, home: Path) -> None:
    """The same two processes under FSDP2 and under DDP; of gloo's peaks nothing is asked, see `held_at`."""
    sharded = small_run(parallel="fsdp2", accumulation=2, steps=5).with_({"parallel.ranks": 2})
    configs = (sharded, sharded.with_({"parallel": "ddp", "accumulation": 1}))
    job = viewers.start(sharded)
    for number, config in enumerate(configs, 1):
        if number > 1:
            job.command(Start(config))
        until(lambda n=number: [run.id.number for run in job.runs() if run.ended].count(n) == 2)  # type: ignore[misc]
        job.command(Save(home / f"{number}.gpumem"))
        until(lambda n=number: [type(event) for event in job.events(0)].count(Saved) == n)  # type: ignore[misc]
        expected = held_at(predict(config, H100).run)
        for run in Recording(home / f"{number}.gpumem").runs():
            assert (run.config["parallel"], run.ended and run.ended.steps) == (config["parallel"], 5)
            for moment, sizes in held_at(run).items():
                sizes["optimizer_state"] -= steps_on_the_host(sizes)
                assert sizes == expected[moment], (run.id.rank, moment)
    job.command(End())
    assert job.wait_ended(30)


def steps_on_the_host(sizes: dict[str, int]) -> int:
    """AdamW counts its steps in a tensor of 4 bytes a parameter, which on a GPU's host is no memory of the GPU."""
    return 4 * 76 if sizes["optimizer_state"] else 0


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": "fsdp2", "accumulation": 2},
        {"parallel": "fsdp2", "dtype": "mixed", "checkpointing": "layers"},
        {"parallel": "fsdp2", "parallel.shard": "hybrid", "lora": True},
        {"parallel": "ddp", "parallel.bucket_view": True},
    ],
    ids=str,
)
def test_all_layers_of_a_rank_follow_from_a_few(settings: dict[str, Any]) -> None:
    config = run_of("gpt2", **settings, **{"parallel.ranks": 4})
    few, all_ = (rehearse(config, H100, every_layer=every, ranks=4) for every in (False, True))
    assert (few.traced_layers, all_.traced_layers) in ((5, None), (6, None))
    assert_same(few, all_)
    assert few.possible_peak_bytes == all_.possible_peak_bytes


def test_shards_of_every_rank_make_up_the_model() -> None:
    """The vocabulary of gpt2 is no multiple of eight: the last rank has fewer rows, and less optimizer state."""
    config = run_of("gpt2", **{"parallel": "fsdp2", "parallel.ranks": 8})
    first = predict(config, H100)
    assert first.alike == ((0, 1, 2, 3, 4, 5, 6), (7,))
    kinds = job.each_kind(first, lambda rank: predict(config, H100, rank=rank))
    held = [one.document.after_first_step.by_category["optimizer_state"] for one in kinds]  # type: ignore[union-attr]
    assert 7 * held[0] + held[1] == 2 * 4 * first.run.events()[1].parameters  # type: ignore[attr-defined]
    assert [one.rank for one in job.figures(kinds)] == list(range(8))
    assert [run.id.rank for run in job.runs(kinds)] == [7, 6, 5, 4, 3, 2, 1, 0]


def test_a_model_of_70_billion_on_64_ranks_is_known_from_a_few_layers() -> None:
    fields = run_fields("llama-3.1-8b")
    layers = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
    large = type(fields["architecture"])(dict(fields["architecture"].config) | layers, "bfloat16")
    settings = {"parallel": "fsdp2", "parallel.ranks": 64, "checkpointing": "layers", "batch_size": 1, "seq_len": 1024}
    config = techniques.configure(fields | {"architecture": large}, settings)
    done = rehearse(config, H100, ranks=64)
    assert done.traced_layers == 6
    loaded = Ledger(done.traces[0]).end
    assert done.parameters == 70_553_706_496
    assert loaded[Category.PARAMETERS] == done.parameters * 2 // 64


DEEPSPEED = {
    # Loaded; of the second step the ends of backward and of the optimizer, and the optimizer's peak.
    ("zero2", "auto", 2): (6_856_768, 15_542_608, 13_828_432, 20_685_144),
    ("zero1", "auto", 2): (6_856_768, 15_542_608, 13_828_432, 20_685_144),
    ("zero2", "default", 1): (6_856_768, 15_542_608, 13_828_432, 20_685_144),
}
"""Measured: DeepSpeed 0.19.8, two gloo ranks, tiny in bfloat16, a row of 16 tokens; by stage, buckets, accumulation."""

NORMS = 64
"""Bytes of the scalars that it keeps of norms, which are not modelled."""


@pytest.mark.parametrize(("stage", "sizes", "accumulation"), DEEPSPEED)
def test_zero_holds_what_deepspeed_held(stage: str, sizes: str, accumulation: int) -> None:
    config = job_of(
        2, parallel=stage, parallel__bucket=sizes, accumulation=accumulation, dtype="bfloat16", batch_size=1
    )
    done = rehearse(config, H100, ranks=2)
    curve = [trace.begin["bytes"].sum() + trace.events["bytes"].cumsum() for trace in done.traces]
    span = {span.phase: span for span in done.traces[2].phases}
    ends = [curve[2][span[phase].end - 1] for phase in (Phase.BACKWARD, Phase.OPTIMIZER)]
    highest = curve[2][span[Phase.OPTIMIZER].begin : span[Phase.OPTIMIZER].end].max()
    found = [int(size) - done.workspace_bytes for size in (curve[0][-1], *ends, highest)]
    for measured, predicted in zip(DEEPSPEED[stage, sizes, accumulation], found, strict=True):
        assert 0 <= measured - predicted <= NORMS
    last = Ledger(done.traces[2])
    assert last.peak.by_category[Category.UNKNOWN] == 0
    assert last.at(span[Phase.OPTIMIZER].begin)[Category.PARAMETERS] == 2 * done.parameters


def test_gradients_that_fill_a_bucket_are_reduced_in_a_flat_copy_where_they_are_of_several_ranks() -> None:
    """With DeepSpeed's own sizes the bucket holds 500 million elements, whatever the model."""
    config = job_of(2, parallel="zero2", parallel__bucket="default", dtype="bfloat16", batch_size=1)
    ledger = Ledger(rehearse(config, H100, ranks=2).traces[2])
    assert ledger.peak.by_category[Category.COMMUNICATION] == 1_000_000_000


def test_ranks_differ_by_how_parameters_are_cut() -> None:
    """An embedding of which a ZeRO partition has a part is kept whole by its rank: rank 3's has a part of both."""
    embeddings = [(500, 10), (100, 50), (10,)]
    assert job.alike(job_of(8, parallel="zero2"), 8, embeddings) == ((3,), (7,), (0, 1, 2, 4, 5, 6))
    assert job.alike(job_of(4, parallel="fsdp2"), 4, [(10, 3), (8, 8)]) == ((0, 1, 2), (3,))
    assert job.alike(job_of(3, parallel="ddp"), 3, [(10, 3)]) == ((0, 1, 2),)
    assert job.alike(job_of(3, parallel="zero3"), 3, embeddings) == ((0, 1, 2),)
    many = job.alike(job_of(64, parallel="fsdp2"), 64, [(rows, 3) for rows in (5, 7, 9, 11, 13)])
    assert len(many) == job.KINDS
    assert sorted(rank for group in many for rank in group) == list(range(64))


SMALL = {
    "stage3_max_live_parameters": 150_000,
    "stage3_max_reuse_distance": 60_000,
    "stage3_prefetch_bucket_size": 80_000,
    "stage3_param_persistence_threshold": 200,
    "sub_group_size": 300_000,
    "reduce_bucket_size": 100_000,
}
"""Beside these the smallest model is a large one: parameters are freed, gathered again, and stepped in groups."""

STAGE_3: list[tuple[dict[str, Any], dict[str, int], tuple[int, int, int, int]]] = [
    # Loaded; of the second step what is gathered when forward ends, the end of backward and the optimizer's peak.
    ({"accumulation": 2}, {}, (6_889_537, 3_428_352, 13_996_633, 20_832_881)),
    ({"checkpointing": "layers"}, {}, (6_889_537, 3_428_352, 13_898_325, 20_734_573)),
    ({"lora": True}, {}, (1_845_313, 2_592_768, 2_206_293, 2_271_853)),
    ({"checkpointing": "layers"}, SMALL, (7_056_769, 534_016, 14_054_813, 16_679_365)),
    ({"accumulation": 2}, SMALL, (7_056_769, 534_016, 14_153_121, 16_777_673)),
]
"""Measured: DeepSpeed 0.19.8, two gloo ranks, tiny in bfloat16, two rows of 16 tokens."""


@pytest.mark.parametrize(("settings", "limits", "measured"), STAGE_3, ids=str)
def test_stage_3_holds_what_deepspeed_held(
    settings: dict[str, Any], limits: dict[str, int], measured: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = zero.deepspeed_settings

    def limited(*arguments: Any) -> dict[str, Any]:
        found = made(*arguments)
        found["zero_optimization"] |= limits
        return found

    monkeypatch.setattr(zero, "deepspeed_settings", limited)
    done = rehearse(job_of(2, parallel="zero3", dtype="bfloat16", **settings), H100, ranks=2)
    curve = [trace.begin["bytes"].sum() + trace.events["bytes"].cumsum() for trace in done.traces]
    span, ledger = {span.phase: span for span in done.traces[2].phases}, Ledger(done.traces[2])
    stepping = span[Phase.OPTIMIZER]
    loaded, backward, highest = (
        int(size) - done.workspace_bytes
        for size in (
            curve[0][-1],
            curve[2][span[Phase.BACKWARD].end - 1],
            curve[2][stepping.begin : stepping.end].max(),
        )
    )
    gathered = ledger.at(span[Phase.FORWARD].end - 1)[Category.GATHERED]
    # Of groups that are stepped one after the other AdamW counts the steps of each, in 4 bytes.
    for real, predicted in zip(measured, (loaded, gathered, backward, highest), strict=True):
        assert 0 <= real - predicted <= NORMS
    assert ledger.peak.by_category[Category.UNKNOWN] == 0


def test_stage_3_gathers_what_a_module_takes_from_another() -> None:
    """DoRA's norms are of a weight that the layer inside it holds; the chunked loss takes the head's."""
    config = job_of(3, parallel="zero3", lora=True, lora__kind="dora", loss="chunked", dtype="bfloat16")
    ledger = Ledger(rehearse(config, H100, ranks=3).traces[2])
    assert ledger.peak.by_category[Category.GATHERED] > 0
    assert torch.nn.functional.linear is torch._C._nn.linear, "DeepSpeed's is gone when a prediction ends"


def test_stage_3_says_which_modules_it_gathers_in_a_way_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_zero3, "MIXTURES", ("GPTNeoXMLP",))
    with pytest.raises(UserError, match="parallel=zero3: how GPTNeoXMLP is gathered cannot be predicted"):
        rehearse(job_of(2, parallel="zero3"), H100, ranks=2)


def test_a_partition_that_lies_within_one_parameter_is_stepped_alone() -> None:
    """The embedding of tiny is 524,288 of its 1.7 million elements: of 16 ranks several have a part of it only."""
    done = rehearse(job_of(16, parallel="zero1", dtype="bfloat16"), H100, ranks=16, rank=1)
    assert Ledger(done.traces[2]).end[Category.OPTIMIZER_STATE] < 12 * done.parameters // 16 + 64


def test_buckets_close_once_they_reach_their_limit() -> None:
    half = [Piece(str(n), 100, torch.float16) for n in range(5)]
    full = [Piece("w", 100, torch.float32)]
    made = buckets([*half[:3], *full, *half[3:]], 200, 500)
    assert [[piece.name for piece in bucket] for bucket in made] == [["0"], ["w"], ["1", "2", "3"], ["4"]]


def test_the_bound_covers_a_first_bucket_that_nccl_holds() -> None:
    """Measured on two H100s: of gpt2's ranks one held it through the second step's loss, the other did not."""
    settings = {"parallel": "ddp", "parallel.bucket_view": True, "checkpointing": "layers", "accumulation": 2}
    config = run_of("gpt2", batch_size=8, seq_len=512, **settings, **{"parallel.ranks": 2})
    told = predict(config, H100)
    gradients = told.by_category["parameters"]
    assert told.peak_phase in ("forward", "backward")
    assert gradients <= told.unsure_bytes < gradients + (2 << 20)
    assert told.safe_bound_bytes > told.peak_bytes + gradients
    assert "NCCL may hold DDP's first bucket" in str(told)


def test_buckets_of_lora_are_of_all_layers() -> None:
    done = rehearse(run_of("gpt2", parallel="ddp", lora=True, **{"parallel.ranks": 2}), H100, ranks=2)
    assert Ledger(done.traces[2]).end[Category.COMMUNICATION] == 4 * done.trainable_parameters


def test_a_job_cannot_be_predicted_within_a_job() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(UserError, match="cannot be predicted in a process that is a rank of one"):
            rehearse(job_of(2, parallel="fsdp2"), H100, ranks=2)
    finally:
        dist.destroy_process_group()


GIB = 1 << 30


def rule(config: RunConfig) -> Prediction:
    """State of 80 GiB that shards, activations of 30 that checkpointing makes 4; a GPU of 48 GiB."""
    state = 80 // max(1, config.integer("parallel.ranks")) * (not config.flag("parallel.offload"))
    peak = (state + (4 if config["checkpointing"] == "layers" else 30)) * GIB
    return foretold(config, peak, fits=peak <= 48 * GIB)


def test_the_fewest_gpus_and_of_the_ways_that_fit_the_one_that_costs_least() -> None:
    asked: list[RunConfig] = []

    def predict_one(config: RunConfig) -> Prediction:
        asked.append(config)
        return rule(config)

    found = fewest_gpus(job_of(0), predict_one)
    assert found is not None
    assert found.words == "2 x H100 80GB: fsdp2 with checkpointing"
    assert (found.gpus, found.prediction.peak_bytes) == (2, 44 * GIB)
    assert len(asked) == 4, "one alone, and then three ways on two"


def test_one_gpu_that_is_enough_needs_no_ranks() -> None:
    found = fewest_gpus(job_of(0), lambda config: foretold(config, GIB, fits=True))
    assert found is not None and found.words == "1 x H100 80GB: as it is"


def test_where_no_number_of_gpus_is_enough_none_is_told() -> None:
    assert fewest_gpus(job_of(0), lambda config: foretold(config, GIB, fits=False)) is None


def test_ways_that_a_configuration_cannot_go_are_left_out() -> None:
    """Bitsandbytes' optimizers step no shards."""
    tried: list[object] = []

    def predict_one(config: RunConfig) -> Prediction:
        tried.append(config["parallel"])
        return foretold(config, GIB, fits=False)

    assert fewest_gpus(job_of(0, optimizer="adamw-8bit"), predict_one) is None
    assert set(tried) == {"none"}


def test_a_gpu_is_named_with_how_many_there_are() -> None:
    several = understand("2 x RTX 4090").gpu
    assert (several.name, several.count) == (gpu("RTX 4090").name, 2)
    assert understand("8xH100 80GB").gpu.count == 8


def test_in_a_machine_of_several_gpus_ranks_are_as_many() -> None:
    machine = Environment("cuda:0", "NVIDIA H100 80GB HBM3", 80 << 30, "9.0", gpus=4)
    assert gpu_of(machine).count == 4
    config = techniques.configure(run_fields("tiny"), {"parallel": "fsdp2", "batch_size": 1, "seq_len": 16})
    assert predict(config, gpu_of(machine)).ranks == 4
    keys = {key_of(config.with_({"parallel": kind}), dataclasses.replace(H100, count=count))
            for kind in ("none", "fsdp2") for count in (1, 4)}  # fmt: skip
    assert len(keys) == 3, "how many GPUs there are decides nothing of a run on one"


def test_estimate_tells_of_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "largest_known", lambda *_: {"max_batch_size": 1, "max_sequence_length": 16})
    file, target = tmp_path / "job.gpumem", tmp_path / "job.json"
    code = main(["estimate", "--set", "parallel=fsdp2", "--gpu", "3 x H100", "--batch-size", "1", "--seq-len", "16",
                 "--json", str(target), "--save", str(file)])  # fmt: skip
    assert code == 0
    said = capsys.readouterr().out
    assert "This is rank 0 of 3; it is the highest; the lowest is rank 2" in said
    assert "for CUDA and NCCL, estimated)" in " ".join(said.split())
    document = json.loads(target.read_text())
    assert [one["rank"] for one in document["ranks"]] == [0, 1, 2]
    peaks = [one["peak"]["allocated_bytes"] for one in document["ranks"]]
    assert peaks[0] == document["peak"]["allocated_bytes"] > peaks[2]
    assert all(one["outside_torch_bytes"] > 850 << 20 for one in document["ranks"])
    low, high = document["reserved_band_bytes"]
    assert document["peak"]["allocated_bytes"] <= low <= document["reserved_bytes"] <= high
    assert [run.id.rank for run in Recording(file).runs()] == [2, 1, 0]
