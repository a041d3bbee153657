"""Jobs of several ranks: real processes that train `tiny` together over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from gpumem_tui.engine import device, engine_registry, techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.engine_registry import find
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.feed import End, Pause, Save, Start, Stop, ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.parallelism import group
from gpumem_tui.engine.parallelism.group import grouped
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.run_events import EngineEnded, Resumed, RunEnded, Saved, StepEnded
from gpumem_tui.engine.techniques.parallel import ranks, shard_ranks
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.engine.tracing.tracer import Tracer
from gpumem_tui.engine.train import loaded, train
from gpumem_tui.engine.workload import build, prepare

from .conftest import Engine, small_run
from .terminal import until
from .viewing import SMALL, Viewers, cli, gone, left_over, steps

DEEPSPEED = (
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, an extra"),
    pytest.mark.filterwarnings("ignore"),  # of what it builds on
)


# --- one rank, in this process ---------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": "ddp"},
        {"parallel": "ddp", "parallel.bucket_view": "on", "accumulation": 2},
        {"parallel": "fsdp2", "accumulation": 2, "checkpointing": "layers"},
        {"parallel": "fsdp2", "parallel.reshard": "off", "lora": "on"},
        {"parallel": "fsdp2", "parallel.offload": "on", "parallel.reduce": "float32"},
        pytest.param({"parallel": "zero1", "accumulation": 2}, marks=DEEPSPEED),
        pytest.param({"parallel": "zero2", "checkpointing": "layers", "lora": "on"}, marks=DEEPSPEED),
        pytest.param({"parallel": "zero3", "dtype": "float32"}, marks=DEEPSPEED),
    ],
    ids=str,
)
def test_a_rank_that_is_alone_trains_as_one_gpu_does(engine: Engine, settings: dict[str, str]) -> None:
    """The engines change where bytes are, and nothing of the mathematics."""
    parsed = techniques.parse(settings, "here")
    alone = {name: value for name, value in parsed.items() if not name.startswith("parallel")}
    losses = []
    for each in (alone, parsed | {"parallel.ranks": 1}):
        document = engine.run(small_run().with_(each))
        assert document["failure"] is None and document["leaked_bytes"] == 0
        assert document["parameters"] == 1_714_176 + 24_576 * (settings.get("lora") == "on")
        losses.append([step["loss"] for step in document["steps"]])
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


@pytest.mark.parametrize("settings", [pytest.param({"parallel": "zero3"}, marks=DEEPSPEED)], ids=str)
def test_a_run_leaves_torch_as_it_was(engine: Engine, settings: dict[str, str]) -> None:
    """DeepSpeed puts a `linear` of its own in torch's place, under which later runs would keep more for backward."""
    linear = functional.linear
    engine.run(small_run().with_(techniques.parse(settings, "here") | {"parallel.ranks": 1}))
    assert functional.linear is linear


@pytest.mark.parametrize("kind", [pytest.param("zero3", marks=DEEPSPEED)])
def test_a_parameter_is_noted_where_it_is_gathered_and_not_at_every_module(kind: str) -> None:
    """Looking through all parameters before each module's forward would take minutes a step in a large model."""
    config, cpu = small_run(steps=1).with_({"parallel": kind, "parallel.ranks": 1}), torch.device("cpu")
    traces: list[StepTrace] = []
    with grouped(config, cpu), OpTracker() as recorder:
        tracer = Tracer(recorder, traces.append, lambda _: None, 60.0)
        with loaded(prepare(config, cpu), tracer) as workload:
            parameters = len(list(workload.model.parameters()))
            train(config, workload, tracer, lambda _: True, lambda: None, lambda _: None)
        tracer.settle()
        tracer.release()
    noted = traces[-1].owners["category"] == Category.GATHERED
    assert parameters <= noted.sum() <= 8 * parameters


def test_mixed_precision_of_shards_gathers_in_16_bit_and_keeps_32(engine: Engine) -> None:
    shards = small_run(parallel="fsdp2").with_({"parallel.ranks": 1})
    float32, mixed = (engine.run(shards.with_({"dtype": dtype})) for dtype in ("float32", "mixed"))
    assert mixed["loaded"]["by_category"]["parameters"] == 4 * mixed["parameters"]
    logits = [document["after_first_step"]["by_category"]["logits_loss"] for document in (mixed, float32)]
    assert logits[0] == pytest.approx(logits[1] / 2, rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": "ddp", "parallel.bucket_view": True},
        {"parallel": "fsdp2"},
        pytest.param({"parallel": "zero1"}, marks=DEEPSPEED),
        pytest.param({"parallel": "zero2"}, marks=DEEPSPEED),
        pytest.param({"parallel": "zero3"}, marks=DEEPSPEED),
    ],
    ids=str,
)
def test_an_engine_is_recognised_in_a_script(settings: dict[str, Any]) -> None:
    config, cpu = small_run().with_(settings | {"parallel.ranks": 1}), torch.device("cpu")
    with grouped(config, cpu):
        made = build(prepare(config, cpu))
        found = techniques.recognise(made.call, made.optimizer)
        made.release()
    assert (settings | {"parallel.ranks": 1}).items() <= found.items()


# --- what cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"parallel": "fsdp2", "lora": "on", "quantization": "nf4"}, "not supported here .*bnb_4bit_quant_storage"),
        ({"parallel": "zero2", "lora": "on", "quantization": "int8"}, "not supported here with quantization: set"),
        ({"parallel": "fsdp2", "checkpointing": "input"}, "set checkpointing=layers"),
        ({"parallel": "ddp", "optimizer_in_backward": "on"}, "set optimizer_in_backward=off"),
        ({"parallel": "zero2", "optimizer": "adamw-8bit"}, "steps shards, which optimizer=adamw-8bit cannot"),
        ({"parallel": "fsdp2", "loss_scaling": "on", "dtype": "mixed-float16"}, "set loss_scaling=off"),
        (
            {"parallel": "fsdp2", "parallel.ranks": 4, "parallel.shard": "hybrid", "parallel.shard_ranks": 3},
            "no groups of equal size",
        ),
    ],
)
def test_what_ranks_cannot_do_together_is_refused_in_a_line(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        small_run(**{name.replace(".", "__"): value for name, value in techniques.parse(settings, "here").items()})


def test_ranks_are_as_many_as_there_are_gpus_and_two_on_a_cpu() -> None:
    config = small_run(parallel="fsdp2")
    assert [ranks(config, gpus) for gpus in (0, 1, 4)] == [2, 1, 4]
    assert ranks(config.with_({"parallel.ranks": 8}), 4) == 8
    assert ranks(small_run(), 4) == 1
    assert shard_ranks(config, 8) == 8
    hybrid = config.with_({"parallel.shard": "hybrid"})
    assert (shard_ranks(hybrid, 8), shard_ranks(hybrid.with_({"parallel.shard_ranks": 2}), 8)) == (4, 2)


def test_a_model_is_refused_that_not_even_shards_of_it_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 weights, gradients and AdamW's two moments of `tiny` are 27.4 MB."""
    monkeypatch.setattr(device, "memory_for_a_run_bytes", lambda _: 20_000_000)
    monkeypatch.setattr(group, "world_size", lambda: 2)
    cpu, config = torch.device("cpu"), small_run(rows=1, batch_size=1).with_({"parallel.ranks": 2})
    for parallel in ("none", "ddp"):
        with pytest.raises(UserError, match="weights, gradients and optimizer state alone take"):
            prepare(config.with_({"parallel": parallel}), cpu)
    prepare(config.with_({"parallel": "fsdp2"}), cpu)
    prepare(config.with_({"parallel": "zero3"}), cpu)


def test_an_engine_of_one_process_refuses_a_run_of_two(engine: Engine) -> None:
    document = engine.run(small_run(parallel="ddp").with_({"parallel.ranks": 2}))
    assert document["failure"] == "parallel=ddp is of 2 ranks, and this engine is of 1"


# --- two processes ------------------------------------------------------------------------


def test_run_trains_two_ranks_and_tells_of_each(home: Path) -> None:
    file = home / "job.gpumem"
    done = cli(
        "run", *SMALL, "--steps", "2", "--set", "parallel=fsdp2", "--set", "parallel.ranks=2", "--json", "-",
        "--save", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["failure"] is None and document["leaked_bytes"] == 0
    assert [step["step"] for step in document["steps"]] == [1, 2]
    assert document["config"]["options"]["parallel.ranks"] == 2
    both = document["ranks"]
    assert [rank["rank"] for rank in both] == [0, 1]
    # Half of the float32 weights each; every dimension is even.
    assert [rank["loaded"]["by_category"]["parameters"] for rank in both] == [2 * document["parameters"]] * 2
    assert document["peak"]["allocated_bytes"] == max(rank["peak"]["allocated_bytes"] for rank in both)
    runs = Recording(file).runs()
    assert [(run.id.number, run.id.rank) for run in runs] == [(1, 1), (1, 0)], "one file holds the job"
    losses = [[event.loss for event in run.events() if isinstance(event, StepEnded)] for run in runs]
    assert losses[0] != losses[1], "each rank has rows of its own"
    until(lambda: left_over(home) in ([str(file)], []))  # torch's launcher cleans up behind its ranks


def test_a_key_goes_from_one_gpu_to_two_ranks_and_back_and_nothing_leaks(viewers: Viewers, home: Path) -> None:
    job = viewers.start(small_run(steps=0))
    until(lambda: steps(job) >= 1)
    wanted = small_run(steps=0, parallel="fsdp2").with_({"parallel.ranks": 2})
    job.command(Start(wanted))
    until(lambda: len(job.members) == 2 and _trained(job, 2) >= 1)
    assert [(run.id.number, run.id.rank) for run in job.runs()] == [(1, 0), (2, 1), (2, 0)]
    names = [member.engine_dir.name for member in job.members]
    listed = cli("ps").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["NAME", "tiny", *names]
    assert "2 ranks" in listed[1] and "training" in listed[1]
    exported = json.loads(cli("export", listed[1].split()[0], "-f", "json", "-o", "-").stdout)["runs"]
    assert [(run["name"], run["number"], run["rank"]) for run in exported] == [
        ("tiny rank 0", 1, 0), ("tiny rank 1", 1, 1),
    ]  # fmt: skip

    # The same processes run what is of as many ranks.
    job.command(Start(wanted.with_({"parallel": "ddp", "parallel.ranks": 0})))
    until(lambda: _trained(job, 3) >= 1)
    assert [member.engine_dir.name for member in job.members] == names

    job.command(Pause(True))
    job.command(Pause(False))
    until(lambda: any(isinstance(event, Resumed) for event in job.events(0)))
    job.command(Save(home / "job.gpumem"))
    until(lambda: any(isinstance(event, Saved) for event in job.events(0)))
    assert [(run.id.number, run.id.rank) for run in Recording(home / "job.gpumem").runs()] == [(3, 1), (3, 0)]

    job.command(Start(small_run(steps=0)))
    until(lambda: len(job.members) == 1 and _trained(job, 4) >= 1)
    leaked = {(run.id.number, run.id.rank): run.ended and run.ended.leaked_bytes for run in job.runs()}
    assert leaked == {(1, 0): 0, (2, 0): 0, (2, 1): 0, (3, 0): 0, (3, 1): 0, (4, 0): None}
    job.command(End())
    assert job.wait_ended(30)
    assert left_over(home) == []


def test_a_rank_that_is_killed_ends_the_job_and_is_named(viewers: Viewers, home: Path) -> None:
    job = viewers.start(small_run(steps=0, parallel="ddp").with_({"parallel.ranks": 2}))
    until(lambda: _trained(job, 1) >= 1)
    other = viewers.attach_job(find("tiny"))
    until(lambda: other.role is ViewerRole.READ_ONLY and len(other.runs()) == 2)
    other.close()
    before = _trained(job, 1)
    until(lambda: _trained(job, 1) > before + 2)  # a viewer that leaves ends nothing
    pids = [info.pid for member in job.members if (info := member.engine_dir.info())]
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: all(map(gone, pids)))  # and not when gloo gives up, half an hour later
    until(lambda: job.role is ViewerRole.GONE)
    ended = job.events(0)[-1]
    assert isinstance(ended, EngineEnded)
    assert ended.text.startswith(f"rank 1, process {pids[1]}: killed by SIGKILL; the job has ended with it; s saves")
    with pytest.raises(UserError, match="the engine has gone"):
        job.command(Stop())
    until(lambda: left_over(home) == [])


def test_stop_ends_all_ranks_of_a_job(viewers: Viewers, home: Path) -> None:
    job = viewers.start(small_run(steps=0, parallel="fsdp2").with_({"parallel.ranks": 2}))
    until(lambda: _trained(job, 1) >= 1)
    done = cli("stop", "tiny")
    assert (done.returncode, done.stdout) == (0, "tiny has ended\n")
    assert engine_registry.engines() == []
    until(lambda: job.role is ViewerRole.GONE)
    assert "ended by gpumem-tui stop" in job.events(0)[-1].text
    assert all(isinstance(run.ended, RunEnded) and run.ended.leaked_bytes == 0 for run in job.runs())
    until(lambda: left_over(home) == [])


def _trained(job: JobSource, number: int) -> int:
    """Steps that every rank of a run has ended."""
    runs = [run for run in job.runs() if run.id.number == number]
    return min((sum(isinstance(event, StepEnded) for event in run.events()) for run in runs), default=0)
