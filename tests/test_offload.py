"""What backward needs, on the host meanwhile: the gradients stay what they are, the memory goes there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from gpumem_tui.engine import activation_offload, techniques
from gpumem_tui.engine.activation_offload import ActivationsOnHost
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.module_names import layer_of
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.prediction_text import text
from gpumem_tui.engine.run_events import StepEnded
from gpumem_tui.engine.watch.checkpoints import observed_checkpoints
from gpumem_tui.engine.workload import build, prepare

from .conftest import LAYERS, TINY, small_run

H100 = gpu("H100 80GB")
INPUT = 2 * 256 * TINY["hidden_size"] * 4
"""Bytes of a layer's input."""


class Elsewhere:
    """Stands for pinned memory on a machine that has none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.leaving: list[weakref.ref[torch.Tensor]] = []
        monkeypatch.setattr(activation_offload, "HOST", torch.device("cpu", 0))  # so that `cpu` is another device
        monkeypatch.setattr(activation_offload, "_page_locked", self._take)

    def _take(self, like: torch.Tensor) -> torch.Tensor:
        self.sizes.append(like.nbytes)
        self.leaving.append(weakref.ref(like))
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


@pytest.mark.parametrize("second_stream", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"checkpointing": "layers"}, {"attention": "eager", "dtype": "mixed"}], ids=str
)
def test_gradients_are_the_same_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], second_stream: bool
) -> None:
    made = build(prepare(small_run(**settings), torch.device("cpu")))
    batch = made.batches.next()
    expected = gradients(made.model, batch)
    host, back, stashed = Elsewhere(monkeypatch), [], []
    with activation_offload.observers.heard_by(
        lambda tensor, stays: (stashed if stays else back).append(tensor.nbytes)
    ):
        found = gradients(made.model, batch, ActivationsOnHost(made.model, second_stream))
    assert all(map(torch.equal, found, expected))
    assert sorted(back) == sorted(host.sizes), "each storage travels once, however many nodes have saved it"
    assert stashed == (host.sizes if second_stream else [])
    parameters = {p.nbytes for p in made.model.parameters()}
    assert min(host.sizes) >= activation_offload.LEAST_BYTES and max(parameters) not in host.sizes


class Device:
    """A device module whose streams say what they are made to wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.current = "computing"
        monkeypatch.setattr(torch, "get_device_module", lambda _: self)

    def Stream(self, _device: torch.device) -> Stream:  # noqa: N802
        return Stream("copying", self.said)

    def current_stream(self, _device: torch.device) -> Stream:
        return Stream(self.current, self.said)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Stream:
    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for {event}")

    def wait_stream(self, stream: Stream) -> None:
        self.said.append(f"{self.name} waits for all of {stream.name}")


def test_a_second_stream_holds_what_the_other_may_still_be_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five wait in the stash; in backward the one that came back, until a node after its own is done."""
    host, device = Elsewhere(monkeypatch), Device(monkeypatch)
    here: list[int] = []
    hooks = ActivationsOnHost(torch.nn.Linear(1, 1), second_stream=True)
    value = torch.randn(512, requires_grad=True)
    leaf = value
    for _ in range(8):
        with hooks:
            value = value.sin()
    assert [flat() is not None for flat in host.leaving] == [False] * 3 + [True] * 5
    assert (
        device.said
        == ["copying waits for all of computing"] * 5
        + [
            "computing waits for copying",
            "copying waits for all of computing",
        ]
        * 3
    )
    device.said.clear()
    arrived: list[weakref.ref[torch.Tensor]] = []

    def came(tensor: torch.Tensor, _stashed: bool) -> None:
        arrived.append(weakref.ref(tensor))
        here.append(sum(flat() is not None for flat in arrived))

    with activation_offload.observers.heard_by(came):
        value.sum().backward()
    assert leaf.grad is not None
    assert len(arrived) == 8 and here[2:] == [2] * 6, "the one wanted, and that of the node before"
    assert device.said.count("computing waits for copying") == 5, "the stash is let go of as backward begins"
    assert device.said.count("computing waits for all of copying") == 7, "the last one was in the stash still"
    assert device.said.count("copying waits for computing") == 7, "no copy overwrites what is still read"
    assert not any(flat() is not None for flat in (*arrived, *host.leaving))


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
    assert after.document.pinned_bytes == after.pinned_bytes and "On the host, page-locked" in text(after)
    assert predicted(checkpointing=mode).pinned_bytes == 0
    names = {block.name for trace in after.run.traces() for block in _activations(trace) if block.bytes == INPUT}
    assert any("layers." in name for name in names), "what comes back is the layer's that wants it"


def _activations(trace: Any) -> list[Any]:
    ledger = Ledger(trace)
    blocks = (ledger.describe(row) for row in range(len(ledger.blocks)))
    return [b for b in blocks if b.category is Category.ACTIVATIONS and b.phase in (Phase.BACKWARD, Phase.RECOMPUTE)]


def test_checkpoints_that_are_not_there_cannot_be_moved() -> None:
    with pytest.raises(UserError, match="set checkpointing=layers"):
        small_run(offload="checkpoints")


@pytest.mark.parametrize("where", ["activations", "checkpoints"])
def test_a_second_stream_is_predicted_with_its_stash_and_pools(where: str) -> None:
    settings = {"offload": where, "checkpointing": "layers" if where == "checkpoints" else "off"}
    one, two = predicted(**settings), predicted(**settings, **{"offload.stream": True})
    assert two.pinned_bytes == one.pinned_bytes
    stashed = [
        block
        for trace in two.run.traces()
        for ledger in [Ledger(trace)]
        for block in map(ledger.describe, range(len(ledger.blocks)))
        if block.name.endswith(".stash")
    ]
    assert stashed and {block.category for block in stashed} == {Category.ACTIVATIONS}
    for prediction, streams in ((one, 1), (two, 2)):
        assert ("each for its own stream alone: default" in text(prediction)) == (streams > 1)
        at_end = [Ledger(trace).pools(len(trace.events) - 1) for trace in prediction.run.traces()]
        assert {len({held.pool.stream for held in pools}) for pools in at_end} == {streams}
        told = [event.reserved_bytes for event in prediction.run.events() if isinstance(event, StepEnded)]
        assert [sum(held.reserved_bytes for held in pools) for pools in at_end[1:]] == told
    assert any(layer_of(block.name).endswith("layers.1") for block in stashed)
    kept = two.by_phase["forward"]["activations"] - one.by_phase["forward"]["activations"]
    assert 0 < kept <= 5 * max(block.bytes for block in stashed)
    document = two.document.as_dict()
    assert (document["unknown_bytes_max"], document["mismatch_bytes_max"]) == (0, 0)


def test_hooks_of_others_are_recognised() -> None:
    made = build(prepare(small_run(), torch.device("cpu")))
    recognised = partial(techniques.recognise, made.model, made.optimizer)
    assert recognised()["offload"] == "off"
    with save_on_cpu():
        assert recognised()["offload"] == "activations" and recognised()["offload.stream"] is False
    with OffloadActivations(use_streams=True):
        assert recognised()["offload"] == "activations" and recognised()["offload.stream"] is True
    made.model.activation_checkpointing_enable(offload=True)
    assert recognised()["offload"] == "checkpoints"
    with observed_checkpoints(made.model):
        assert recognised()["offload"] == "checkpoints", "also while it is watched"


class OffloadActivations(saved_tensors_hooks):
    """TRL's, as far as it is recognised: functions made in its constructor, by what it is told."""

    def __init__(self, use_streams: bool) -> None:
        self.use_streams = use_streams

        def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if self.use_streams else tensor.clone()

        super().__init__(pack_tensor, lambda tensor: tensor)


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
