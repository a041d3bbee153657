"""Optimizers that hold their state, or step, in another way: what they learn and what they hold."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import Category, Phase
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.optimizer_in_backward import OptimizerInBackward

from .conftest import Engine, small_run


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum", "adafactor"])
def test_a_step_in_backward_learns_the_same(engine: Engine, optimizer: str) -> None:
    after, within = (
        engine.run(small_run(optimizer=optimizer, optimizer_in_backward=on, steps=3))["steps"] for on in ("off", "on")
    )
    assert [s["loss"] for s in within] == pytest.approx([s["loss"] for s in after], rel=1e-5)
    assert within[-1]["peak_bytes"] < after[-1]["peak_bytes"]


@pytest.mark.parametrize("checkpointing", ["off", "layers"])
def test_gradients_go_one_by_one_and_each_has_its_name(engine: Engine, checkpointing: str) -> None:
    engine.run(small_run(optimizer_in_backward="on", checkpointing=checkpointing))
    ledger = Ledger(engine.traces[-1])
    gradients = ledger.curve[Category.GRADIENTS]
    largest = ledger.blocks["bytes"][ledger.blocks["category"] == Category.GRADIENTS].max()
    assert 0 < gradients.max() <= 2 * largest
    assert gradients[-1] == 0
    marks = ledger.trace.marks
    steps = marks[(marks["phase"] == Phase.OPTIMIZER) & (marks["module"] > 0)]
    assert {ledger.trace.names[n] for n in steps["module"]} == {"AdamW", "OptimizerInBackward"}
    assert ledger.curve[Category.UNKNOWN].max() == 0


def test_an_optimizer_in_backward_goes_with_its_parameters() -> None:
    """A hook of a tensor is where the garbage collector does not look."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = OptimizerInBackward([parameter], lambda one: torch.optim.SGD(one, lr=0.5))
    parameter.sum().backward()
    assert parameter.tolist() == [0.5] * 3 and parameter.grad is None
    gone = weakref.ref(parameter)
    del parameter, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"accumulation": 2}, "set accumulation=1"),
        ({"dtype": "mixed-float16", "loss_scaling": "on"}, "loss_scaling=off"),
    ],
)
def test_a_step_in_backward_waits_for_nothing(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        small_run(optimizer_in_backward="on", **settings)
