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

from .examples.ranks import CASES, LAYERS, STEPS, WIDTH

RANKS = 2
SCRIPT = Path(__file__).parent / "examples" / "ranks.py"
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", str(SCRIPT)]
    return subprocess.run([*command, str(folder), *cases], env=environment, capture_output=True, text=True, check=False)


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
