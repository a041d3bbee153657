"""Compiled layers: where they can be had, and that what they hold is theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.workload import build, prepare

from .conftest import LAYERS, small_run


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "set kv_cache=off"),
        ({"kv_cache": "off", "lora": "on", "quantization": "nf4"}, "set quantization=none"),
        ({"kv_cache": "off", "offload": "activations"}, "set offload=off"),
        ({"kv_cache": "off", "parallel": "ddp"}, "set parallel=none"),
        ({"kv_cache": "off", "checkpointing": "layers"}, "set checkpointing=off"),
    ],
)
def test_what_cannot_be_compiled_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        small_run(compile="on", **settings)


def test_it_is_said_not_to_be_predicted() -> None:
    with pytest.raises(UserError, match="compile=on is not predicted"):
        predict(small_run(compile="on", kv_cache="off"), gpu("H100 80GB"))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by the compiler itself
def test_every_layer_is_compiled_recognised_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="eager"))
    config = small_run(compile="on", kv_cache="off")
    made = build(prepare(config, torch.device("cpu")))
    plain = build(prepare(config.with_({"compile": False}), torch.device("cpu")))
    compiled = [module for module in made.model.modules() if vars(module).get("_compiled_call_impl")]
    assert len(compiled) == LAYERS
    assert techniques.recognise(made.model, made.optimizer)["compile"] is True
    assert techniques.recognise(plain.model, plain.optimizer)["compile"] is False
    batch = made.batches.next()
    losses = [each.model(**batch).loss for each in (made, plain)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    gradients = ([p.grad for p in each.model.parameters()] for each in (made, plain))
    assert all(map(torch.equal, *gradients))
    made.release()
