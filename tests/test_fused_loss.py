"""The loss without logits: the same numbers and gradients as with them."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch.nn import functional

from gpumem_tui.engine import fused_loss, techniques
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.fused_loss import ChunkedCrossEntropy, Scaling
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.workload import build, prepare
from gpumem_tui.profiles import run_fields

from .conftest import Engine, small_run

N, V, H = 11, 23, 8
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiles_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tokens, vocabulary and rows each come in several pieces, the last one smaller."""
    monkeypatch.setattr(fused_loss, "TOKENS", 4)
    monkeypatch.setattr(fused_loss, "WORDS", 9)
    monkeypatch.setattr(fused_loss, "ROWS", 3)


def inputs(dtype: torch.dtype, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(0)
    bias = torch.randn(V, dtype=dtype, requires_grad=True) if with_bias else None
    hidden, weight = (torch.randn(n, H, dtype=dtype, requires_grad=True) for n in (N, V))
    return hidden, weight, bias, torch.randint(0, V, (N,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scaling", [Scaling(), Scaling(0.5), Scaling(2.0, 3.0)], ids=str)
def test_it_is_cross_entropy_with_its_gradients(dtype: torch.dtype, with_bias: bool, scaling: Scaling) -> None:
    hidden, weight, bias, targets = inputs(dtype, with_bias)
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    found = -ChunkedCrossEntropy.apply(hidden, weight, bias, targets, scaling)
    gradients = torch.autograd.grad(found.mean(), wanted)
    logits = functional.linear(hidden, weight, bias).float() * scaling.factor
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    for one, other in zip(gradients, torch.autograd.grad(expected.mean(), wanted), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_a_frozen_head_has_no_gradient_made() -> None:
    hidden, weight, bias, targets = inputs(torch.float32, False)
    weight.requires_grad_(False)
    ChunkedCrossEntropy.apply(hidden, weight, bias, targets, Scaling()).sum().backward()
    assert weight.grad is None and hidden.grad is not None


def test_what_is_not_to_be_learned_counts_for_nothing() -> None:
    hidden, weight, _, targets = inputs(torch.float32, False)
    labels = targets.masked_fill(torch.arange(N) % 3 == 0, fused_loss.IGNORED)
    head = torch.nn.Linear(H, V, bias=False)
    head.weight = torch.nn.Parameter(weight.detach())
    for compute in (fused_loss.chunked, fused_loss.linear_cross_entropy):
        found = compute(hidden, head, labels, Scaling())
        torch.testing.assert_close(found, functional.cross_entropy(functional.linear(hidden, weight), labels))


@pytest.mark.parametrize(
    ("kind", "dtype", "rel"),
    [
        ("chunked", "float32", 1e-4),
        ("chunked", "mixed", 1e-2),
        ("linear-cross-entropy", "float32", 1e-4),
        ("linear-cross-entropy", "mixed", 3e-2),  # PyTorch adds up and returns it in bfloat16
    ],
)
def test_a_model_learns_the_same(
    engine: Engine, kind: str, dtype: str, rel: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "WORDS", 1500)  # of tiny's 2048: two tiles, where tiles of 9 would be 228
    full, fused = (engine.run(small_run(loss=loss, dtype=dtype, steps=3))["steps"] for loss in ("full", kind))
    assert [s["loss"] for s in fused] == pytest.approx([s["loss"] for s in full], rel=rel)


def test_without_labels_a_model_returns_its_logits() -> None:
    made = build(prepare(small_run(loss="chunked"), CPU))
    batch = made.batches.next()
    assert made.model(**batch).logits is None
    assert made.model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_an_adapter_on_the_head_is_refused() -> None:
    made = build(prepare(small_run(loss="chunked", lora="on", lora__targets="lm_head"), CPU))
    with pytest.raises(UserError, match=r"take the head out of lora\.targets"):
        made.model(**made.batches.next())


@pytest.mark.parametrize(("kind", "fits"), [("chunked", True), ("liger", True), ("linear-cross-entropy", False)])
def test_a_model_that_caps_its_logits_takes_what_can(kind: str, fits: bool) -> None:
    config = techniques.configure(run_fields("gemma-2-2b"), {"loss": kind})
    found = techniques.registry()["loss"].unsuitable(config, prepare(config.with_({"loss": "full"}), CPU, True).shell)
    assert (found is None) == fits


def test_trls_head_is_recognised() -> None:
    """`trl.trainer.utils.add_fused_lm_head` binds a function of this name."""
    made = build(prepare(small_run(), CPU))

    def _fused_forward(self: Any, **batch: Any) -> Any:
        return type(self).forward(self, **batch)

    made.model.forward = MethodType(_fused_forward, made.model)
    assert techniques.recognise(made.model, made.optimizer)["loss"] == "chunked"


def test_where_logits_were_the_peak_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # tiles as they are
    settings = techniques.parse({"batch_size": 2, "seq_len": 2048, "lora": "on", "checkpointing": "layers"}, "test")
    config = techniques.configure(run_fields("llama-3.2-1b"), settings)
    found = {
        loss: predict(config.with_({"loss": loss}), gpu("H100 80GB"))
        for loss in ("full", "chunked", "linear-cross-entropy", "liger")
    }
    logits_bytes = 2 * 2048 * 128_256 * 4
    assert found["full"].by_category["logits_loss"] > logits_bytes
    for loss in ("chunked", "linear-cross-entropy", "liger"):
        assert found["full"].peak_bytes - found[loss].peak_bytes > logits_bytes
        assert found[loss].document.unknown_bytes_max == 0
