"""What backward needs, on the host meanwhile: the gradients stay what they are, the memory goes there."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from gpumem_tui.engine import activation_offload, techniques
from gpumem_tui.engine.activation_offload import ActivationsOnHost
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.workload import build, prepare

from .conftest import LAYERS, TINY, small_run

H100 = gpu("H100 80GB")
INPUT = 2 * 256 * TINY["hidden_size"] * 4
"""Bytes of a layer's input."""


class Elsewhere:
    """Stands for pinned memory on a machine that has none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        monkeypatch.setattr(activation_offload, "HOST", torch.device("cpu", 0))  # so that `cpu` is another device
        monkeypatch.setattr(activation_offload, "_page_locked", self._take)

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        self.sizes.append(like.nbytes)
        return torch.empty_like(like)


def gradients(model: Any, batch: Any, around: Any = None) -> list[torch.Tensor]:
    model.zero_grad()
    if around is None:
        loss = model(**batch).loss
    else:
        with around:
            loss = model(**batch).loss
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "settings", [{}, {"checkpointing": "layers"}, {"attention": "eager", "dtype": "mixed"}], ids=str
)
def test_gradients_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    made = build(prepare(small_run(**settings), torch.device("cpu")))
    batch = made.batches.next()
    expected = gradients(made.model, batch)
    host, back = Elsewhere(monkeypatch), []
    with activation_offload.observer(lambda tensor: back.append(tensor.nbytes)):
        found = gradients(made.model, batch, ActivationsOnHost(made.model))
    assert all(map(torch.equal, found, expected))
    assert sorted(back) == sorted(host.sizes), "each storage travels once, however many nodes have saved it"
    parameters = {p.nbytes for p in made.model.parameters()}
    assert min(host.sizes) >= activation_offload.LEAST_BYTES and max(parameters) not in host.sizes


def test_what_was_written_to_since_travels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Elsewhere(monkeypatch)
    leaf = torch.randn(512, requires_grad=True)
    with ActivationsOnHost(torch.nn.Linear(1, 1)):
        value = leaf * 2
        total = (value.detach() * leaf).sum() + value.exp().sum()
        plain = value.detach().mul_(3)
        total = total + (plain * leaf).sum()
    total.backward()
    with torch.no_grad():
        doubled = leaf * 2
        expected = doubled + 2 * doubled.exp() + 3 * doubled
    assert torch.allclose(leaf.grad, expected)  # type: ignore[arg-type]
    assert len(host.sizes) >= 3


def predicted(**settings: Any) -> Prediction:
    quick = {"seq_len": 256, "kv_cache": "off", "loss": "chunked"}
    return predict(small_run(**quick, **settings), H100)


@pytest.mark.parametrize(
    "settings", [{}, {"lora": "on"}, {"dtype": "mixed", "accumulation": 2}, {"checkpointing": "selective"}], ids=str
)
def test_activations_are_on_the_host_as_the_forward_ends(settings: dict[str, Any]) -> None:
    before, after = predicted(**settings), predicted(**settings, offload="activations")
    saved = before.by_phase["forward"]["activations"]
    assert after.by_phase["forward"]["activations"] < saved / 2
    assert after.peak_bytes < before.peak_bytes or before.peak_phase == "optimizer step"
    assert saved / 3 <= after.pinned_bytes <= 2 * saved, "PyTorch's host allocator rounds up to powers of two"
    document = after.document.as_dict()
    assert (document["unknown_bytes_max"], document["mismatch_bytes_max"]) == (0, 0)


@pytest.mark.parametrize("mode", ["layers", "input"])
def test_of_checkpoints_the_inputs_are(mode: str) -> None:
    after = predicted(checkpointing=mode, offload="checkpoints")
    assert after.pinned_bytes == INPUT * (LAYERS if mode == "layers" else 1)
    assert predicted(checkpointing=mode).pinned_bytes == 0
    names = {block.name for trace in after.run.traces() for block in _activations(trace) if block.bytes == INPUT}
    assert any("layers." in name for name in names), "what comes back is the layer's that wants it"


def _activations(trace: Any) -> list[Any]:
    from gpumem_tui.engine.events import Category, Phase
    from gpumem_tui.engine.ledger import Ledger

    ledger = Ledger(trace)
    blocks = (ledger.describe(row) for row in range(len(ledger.blocks)))
    return [b for b in blocks if b.category is Category.ACTIVATIONS and b.phase in (Phase.BACKWARD, Phase.RECOMPUTE)]


def test_checkpoints_that_are_not_there_cannot_be_moved() -> None:
    with pytest.raises(UserError, match="set checkpointing=layers"):
        small_run(offload="checkpoints")


def test_hooks_of_others_are_recognised() -> None:
    made = build(prepare(small_run(), torch.device("cpu")))
    recognised = partial(techniques.recognise, made.model, made.optimizer)
    assert recognised()["offload"] == "off"
    with save_on_cpu():
        assert recognised()["offload"] == "activations"
    made.model.activation_checkpointing_enable(offload=True)
    assert recognised()["offload"] == "checkpoints"


def test_an_address_that_was_a_bias_s_is_no_reason_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes gives a bias other data in the first forward pass."""
    host = Elsewhere(monkeypatch)
    layer = torch.nn.Linear(512, 512)
    hooks = ActivationsOnHost(layer)
    with hooks:
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()
        inputs = [torch.randn(512, requires_grad=True) for _ in range(8)]
        kept = [x * x for x in inputs]
    assert kept and len(host.sizes) == len(inputs), "whatever addresses they have got"
