"""Optimizers that hold their state, or step, in another way: what they learn and what they hold."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.device import environment
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.optimizer_in_backward import OptimizerInBackward
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.workload import build, prepare

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


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(engine: Engine) -> None:
    settings = {"optimizer": "muon", "trainable__embeddings": "auto"}
    made = build(prepare(small_run(**settings), torch.device("cpu")))
    names = {id(p): name for name, p in made.model.named_parameters()}
    muon, adamw = (part.param_groups[0]["params"] for part in made.optimizer.parts)  # type: ignore[attr-defined]
    ends = (made.model.get_input_embeddings().weight, made.model.get_output_embeddings().weight)
    by_class = {"Muon": [names[id(p)] for p in muon], "AdamW": [names[id(p)] for p in adamw]}
    assert all("layers." in name and name.endswith("weight") for name in by_class["Muon"])
    assert len({names[id(p)] for p in ends} & set(by_class["AdamW"])) == 2
    document = engine.run(small_run(**settings, steps=3))
    state = document["after_first_step"]["by_category"]["optimizer_state"]
    matrices = sum(p.numel() for p in muon)
    others = document["trainable_parameters"] - matrices
    assert state == 4 * (matrices + 2 * others) + 4 * len(by_class["AdamW"])
    losses = [step["loss"] for step in document["steps"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("kind", "bits", "block"), [("8bit", 8, 256), ("4bit", 4, 128), ("fp8", 8, 256)])
def test_torchao_s_states_are_as_few_bits_as_predicted(engine: Engine, kind: str, bits: int, block: int) -> None:
    config = small_run(optimizer=f"ao-adamw-{kind}")
    measured, predicted = engine.run(config), predict(config, gpu("H100 80GB"))
    state = measured["after_first_step"]["by_category"]["optimizer_state"]
    trained = measured["trainable_parameters"]
    assert state == pytest.approx(2 * trained * (bits / 8 + 4 / block), rel=0.05)
    counters = 4 * (1 + len(list(made_parameters(config))))  # steps and a learning rate, on the host where there is one
    found = predicted.document.after_first_step
    assert found is not None and found.by_category["optimizer_state"] == state - counters


def made_parameters(config: Any) -> Any:
    return prepare(config, torch.device("cpu")).shell.parameters()


def test_an_optimizer_on_the_host_leaves_the_device_weights_and_gradients() -> None:
    plain, moved = (predict(small_run(optimizer=kind), gpu("H100 80GB")) for kind in ("adamw-fused", "cpu-offload"))
    weights = plain.by_category["parameters"]
    assert moved.by_category["optimizer_state"] < weights / 50, "of what is too small to be moved"
    assert moved.by_category["gradients"] == plain.by_category["gradients"]
    assert 2 * 0.9 * weights <= moved.pinned_bytes <= 2 * 2 * weights, "weights and gradients, up to powers of two"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizer_in_backward": "on"}, "set optimizer_in_backward=off"),
        ({"loss_scaling": "on", "dtype": "mixed-float16"}, "set loss_scaling=off"),
        ({"parallel": "ddp"}, "set parallel=none"),
    ],
)
def test_gradients_that_leave_early_leave_too_early_for_some(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        small_run(optimizer="cpu-offload", **settings)


def test_without_torchao_its_optimizers_are_refused_and_still_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment(torch.device("cpu"))
    without = replace(here, packages={k: v for k, v in here.packages.items() if k != "torchao"})
    config = small_run(optimizer="ao-adamw-4bit")
    with pytest.raises(UserError, match=r"pip install 'gpumem-tui\[torchao\]'"):
        techniques.check(config, without)
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it could not be imported
    assert predict(config, gpu("H100 80GB")).peak_bytes > 0
