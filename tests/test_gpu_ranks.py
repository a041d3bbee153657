"""On two CUDA devices: jobs over NCCL; every byte of every rank has a name, nothing leaks, and a dead rank is named."""

from __future__ import annotations

import importlib.util
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.feed import End, Start, ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.report import report
from gpumem_tui.engine.run_events import EngineEnded, StepEnded
from gpumem_tui.profiles import run_fields

from .terminal import until
from .viewing import gone, left_over

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(600),
]

ENDS_WITHIN_S = 5.0
"""The job, once a rank has died; NCCL alone would give up after minutes."""
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
RUNS: list[dict[str, Any]] = [
    {"parallel": "ddp"},
    {"parallel": "ddp", "parallel.bucket_view": "on", "lora": "on", "checkpointing": "layers"},
    {"parallel": "ddp", "lora": "on", "quantization": "nf4"},
    {"parallel": "fsdp2"},
    {"parallel": "fsdp2", "parallel.reshard": "off", "accumulation": 2},
    {"parallel": "fsdp2", "dtype": "mixed", "checkpointing": "layers", "accumulation": 2},
    {"parallel": "fsdp2", "lora": "on", "parallel.offload": "on"},
    *([{"parallel": f"zero{stage}", "accumulation": stage} for stage in (1, 2, 3)] if DEEPSPEED else []),
]


def config_of(settings: dict[str, Any], steps: int) -> RunConfig:
    wanted = {"batch_size": 2, "seq_len": 256, "steps": steps, "parallel.ranks": 2} | settings
    config = techniques.configure(run_fields("qwen2.5-0.5b"), techniques.parse(wanted, "test"))
    return replace(config, trace="every")


def trained(job: JobSource, number: int, count: int) -> bool:
    """True once every rank of a run has ended so many steps; says why where the job has ended instead."""
    assert job.role is not ViewerRole.GONE, job.events(0)[-1].text
    runs = [run for run in job.runs() if run.id.number == number]
    told = [sum(isinstance(event, StepEnded) for event in run.events()) for run in runs]
    return len(told) == len(job.members) > 0 and min(told) >= count


def test_every_byte_of_every_rank_has_a_name_and_none_leaks(home: Path) -> None:
    """One job runs all: the groups stay, and of what a run has allocated nothing."""
    job = JobSource(Launcher())
    job.start(config_of(RUNS[0], 3))
    for number, settings in enumerate(RUNS, 1):
        if number > 1:
            job.command(Start(config_of(settings, 3)))
        until(lambda n=number: trained(job, n, 3), seconds=240)  # type: ignore[misc]
        runs = [run for run in job.runs() if run.id.number == number]
        until(lambda r=runs: all(run.ended and len(run.traces()) >= 4 for run in r))  # type: ignore[misc]
        for run in runs:
            document = report(run)
            told = f"rank {run.id.rank}: {settings}"
            assert (document.unknown_bytes_max, document.mismatch_bytes_max, document.leaked_bytes) == (0, 0, 0), told
            assert document.peak is not None
            assert document.peak.allocated_bytes == max(s.peak_bytes or 0 for s in document.steps), told
    job.command(End())
    assert job.wait_ended(60)
    job.close()
    until(lambda: left_over(home) == [])


def test_a_key_goes_from_one_gpu_to_shards_on_two_and_back(home: Path) -> None:
    job = JobSource(Launcher())
    alone, shards = config_of({"parallel": "none"}, 0), config_of({"parallel": "fsdp2"}, 0)
    job.start(alone)
    for number, config in enumerate((alone, shards, alone), 1):
        if number > 1:
            job.command(Start(config))
        until(lambda n=number: trained(job, n, 2), seconds=240)  # type: ignore[misc]
    job.command(End())
    assert job.wait_ended(60)
    leaked = {(run.id.number, run.id.rank): run.ended and run.ended.leaked_bytes for run in job.runs()}
    assert leaked == {(1, 0): 0, (2, 1): 0, (2, 0): 0, (3, 0): 0}
    job.close()


@pytest.mark.parametrize("fault", ["killed", "out of memory"])
def test_a_rank_that_dies_ends_the_job_and_is_named(home: Path, fault: str) -> None:
    job = JobSource(Launcher())
    job.start(config_of({"parallel": "fsdp2"}, 0))
    until(lambda: trained(job, 1, 2), seconds=240)
    pids = [info.pid for member in job.members if (info := member.engine_dir.info())]
    if fault == "killed":
        os.kill(pids[1], signal.SIGKILL)
    else:
        job.command(Start(config_of({"parallel": "fsdp2", "batch_size": 4096}, 0)))
        until(lambda: job.runs()[-1].id.number == 2 and any(e.is_problem for e in job.events(0)), seconds=240)
    until(lambda: all(map(gone, pids)), seconds=ENDS_WITHIN_S)
    until(lambda: job.role is ViewerRole.GONE)
    said = next(event.text for event in job.events(0) if isinstance(event, EngineEnded))
    assert said.startswith(f"rank 1, process {pids[1]}: killed by SIGKILL" if fault == "killed" else "rank "), said
    assert "the job has ended with it" in said
    job.close()
    until(lambda: left_over(home) == [])
