"""Real ranks, each watched: parameters are shards, what is gathered and what is sent have categories of their own.

Two processes train over gloo (`examples/ranks.py`), started as anybody starts theirs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine import engine_registry
from gpumem_tui.engine.feed import ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.watch.job_rank import JobRank, job_rank

from .examples.ranks import CASES, LAYERS, STEPS, WIDTH
from .terminal import until
from .watching import EXAMPLES, run_under_exec

RANKS = 2
SCRIPT = EXAMPLES / "ranks.py"
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
FLOAT, HALF = 4, 2

BLOCK = (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,)
HEAD = (1, WIDTH), (1,)
SHAPES = (*BLOCK * LAYERS, *HEAD)

Case = list[dict[str, Any]]
"""What every rank tells of a case."""


def numel(shapes: tuple[tuple[int, ...], ...]) -> int:
    return sum(rows * (rest[0] if rest else 1) for rows, *rest in shapes)


def sharded(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Elements of a rank: `fully_shard` cuts the first dimension, and every rank has the padded size."""
    return sum(-(-rows // RANKS) * (rest[0] if rest else 1) for rows, *rest in shapes)


def own(rank: int) -> int:
    """Elements of a rank's shards without what they are padded with, which nobody optimizes."""
    of = ((-(-rows // RANKS), rows, rest[0] if rest else 1) for rows, *rest in SHAPES)
    return sum(max(0, min(share, rows - rank * share)) * width for share, rows, width in of)


def launch(folder: Path, cases: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "XDG_RUNTIME_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]),
    }  # fmt: skip
    command = [*LAUNCHER, str(SCRIPT), str(folder), *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("g")
    with_deepspeed = importlib.util.find_spec("deepspeed") is not None
    cases = [case for case in CASES if with_deepspeed or not case.startswith("zero")]
    ended = launch(folder, cases)
    assert ended.returncode == 0, ended.stderr

    def read(case: str) -> Case:
        if case not in cases:
            pytest.skip("deepspeed is not installed")
        return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(RANKS)]

    return read


@pytest.mark.parametrize("case", list(CASES))
def test_every_byte_of_every_rank_has_an_owner(told: Callable[[str], Case], case: str) -> None:
    for rank in told(case):
        assert rank["problem"] == [] and rank["as_it_was"]
        assert len(rank["steps"]) == STEPS
        for step in rank["steps"]:
            assert step["most"]["unknown"] == step["mismatch"] == 0
            assert step["most"]["held_by_script"] <= 160, "the loss, and what gloo's threads have yet to let go of"


def test_the_buckets_of_ddp_are_one_more_copy_of_the_gradients(told: Callable[[str], Case]) -> None:
    for rank in told("ddp"):
        for step in rank["steps"]:
            assert step["after_backward"]["communication"] == numel(SHAPES) * FLOAT
            assert step["after_backward"]["gradients"] == numel(SHAPES) * FLOAT
            assert step["most"]["gathered"] == 0


def test_gradients_that_are_views_into_buckets_are_gradients(told: Callable[[str], Case]) -> None:
    for rank in told("ddp-view"):
        for step in rank["steps"]:
            assert step["most"]["communication"] == 0
            assert step["after_backward"]["gradients"] == numel(SHAPES) * FLOAT


def test_a_bucket_that_is_given_up_and_held_is_no_gradient_any_more(told: Callable[[str], Case]) -> None:
    for rank in told("ddp-held"):
        assert [step["most"]["communication"] for step in rank["steps"]] == [0, numel(SHAPES) * FLOAT, 0, 0]
        for step in rank["steps"]:
            assert step["most"]["gradients"] == step["after_backward"]["gradients"] == numel(SHAPES) * FLOAT


@pytest.mark.parametrize(("case", "gathered"), [("fsdp2", FLOAT), ("fsdp2-mixed", HALF), ("fsdp2-kept", FLOAT)])
def test_what_fully_shard_holds(told: Callable[[str], Case], case: str, gathered: int) -> None:
    shards = sharded(SHAPES) * FLOAT
    of_block, of_head = RANKS * sharded(BLOCK), RANKS * sharded(HEAD)
    for number, rank in enumerate(told(case)):
        for step in rank["steps"][1:]:
            most, after = step["most"], step["after_backward"]
            assert most["parameters"] == after["gradients"] == shards
            assert step["end"]["optimizer_state"] == (2 * own(number) + len(SHAPES)) * FLOAT, "moments, and the steps"
            assert after["gathered"] == after["communication"] == 0, "resharded; the last reduction is over"
            # The root's parameters, those of a layer, and the outputs of two gathers.
            blocks = LAYERS + 2 if case == "fsdp2-kept" else 3
            assert most["gathered"] == (of_head + blocks * of_block) * gathered
            copied_in = sharded(BLOCK) * HALF if gathered == HALF else 0
            assert most["communication"] == of_block * FLOAT + copied_in


@pytest.mark.parametrize("case", ["fsdp1", "fsdp1-original"])
def test_what_fsdp1_holds(told: Callable[[str], Case], case: str) -> None:
    # One flat parameter a layer, cut in two; the root's is padded to be cut.
    shards = (LAYERS * numel(BLOCK) + numel(HEAD) + 1) // RANKS * FLOAT
    for rank in told(case):
        for step in rank["steps"][1:]:
            assert step["most"]["parameters"] == step["after_backward"]["gradients"] == shards
            assert step["after_backward"]["gathered"] == 0
            # The root's, and two layers' at the most.
            assert step["most"]["gathered"] == (2 * numel(BLOCK) + numel(HEAD) + 1) * FLOAT


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3"])
def test_what_zero_holds(told: Callable[[str], Case], case: str) -> None:
    padded = -(-numel(SHAPES) // (2 * RANKS)) * 2 * RANKS if case != "zero3" else RANKS * -(-numel(SHAPES) // RANKS)
    for rank in told(case):
        for step in rank["steps"][1:]:
            end = step["end"]
            assert end["parameters"] == padded * HALF // (RANKS if case == "zero3" else 1)
            # Master weights and two moments in float32, of a rank's share.
            assert abs(end["optimizer_state"] - 3 * padded * FLOAT // RANKS) <= 8 * FLOAT, "and a few scalars"
            assert step["most"]["communication"] >= 5000 * HALF, "the bucket in which gradients are reduced"
            assert (step["most"]["gathered"] > 0) == (case == "zero3")


# --- the job ----------------------------------------------------------------------------


@pytest.mark.usefixtures("runtime_folder")
@pytest.mark.parametrize("code", [0, 1])
def test_the_ranks_of_a_script_that_was_not_edited_are_one_job(tmp_path: Path, code: int) -> None:
    stop = tmp_path / "stop"
    script = run_under_exec(*LAUNCHER, str(EXAMPLES / "unedited_ranks.py"), str(stop))
    try:
        job = until(lambda: next((job for job in engine_registry.jobs() if len(job.members) == RANKS), None))
        assert job.name.startswith("unedited_ranks-") and job.ranks == RANKS
        source = JobSource()
        source.attach(job)
        until(lambda: [run.id.rank for run in source.runs() if run.latest is not None] == [1, 0])
        assert {run.id.engine for run in source.runs()} == {job.name}
        assert {run.config.text("parallel") for run in source.runs()} == {"ddp"}
        assert source.role is ViewerRole.WATCHING
        source.close()
    finally:
        stop.write_text(str(code))
        out, err = script.communicate()
    assert out == f"trained on {RANKS} ranks\n"
    assert err.count("gpumem-tui:") == 1 and f"on {RANKS} ranks; to see it: gpumem-tui attach {job.name}\n" in err
    assert script.returncode == code
    assert engine_registry.engines() == []


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500"}, "train-29500"),
        ({"TORCHELASTIC_RUN_ID": "8f0c1b52-52d5-4b6e-9f06-2c5f3c0f6a11", "MASTER_PORT": "41234"}, "train-8f0c1b52"),
        ({"TORCHELASTIC_RUN_ID": "friday"}, "train-friday"),
        ({}, f"train-{os.getppid()}"),
    ],
)
def test_all_ranks_arrive_at_the_same_name(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
    for variable in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in (environment | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(variable, value)
    assert job_rank("train") == JobRank(name, 3, 8, is_first_here=False)


def test_a_script_of_one_rank_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert job_rank("train") == JobRank()
