"""PyTorch on a modelled GPU: what its own code does there, and what is said of versions that are not known."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gpumem_tui.engine.config import Architecture, UserError
from gpumem_tui.engine.prediction import bitsandbytes_cuda
from gpumem_tui.engine.prediction.cuda_kernels import kernels
from gpumem_tui.engine.prediction.cuda_patches import cuda_paths
from gpumem_tui.engine.prediction.fake_cuda import DEVICE, FakeCuda
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.op_cache import op_cache
from gpumem_tui.engine.prediction.predict import predict

from .conftest import small_run

H100 = gpu("H100 80GB")
Tensor = torch.Tensor


@contextmanager
def modelled() -> Iterator[FakeCuda]:
    recorder = FakeCuda(kernels(H100))
    with cuda_paths(H100, recorder), op_cache().mode, recorder:
        recorder.calibrate()
        yield recorder


def allocations(loss_of: Callable[[Tensor], Tensor]) -> int:
    """How many blocks of the input's size a forward and a backward pass take."""
    with modelled() as recorder:
        x = torch.empty(1000, device=DEVICE, requires_grad=True)
        before = len(recorder.rows())
        loss_of(x.sin()).sum().backward()
        return int((recorder.rows()[before:]["bytes"] == x.nbytes).sum())


# --- gradients are added up in place where autograd does so ------------------------------------


def test_gradients_of_several_uses_are_added_up_in_place() -> None:
    """One use more: what it returns, the sum of it, its gradient; and no block for the sum of the gradients."""
    two = allocations(lambda h: h.cos() + h.exp())
    three = allocations(lambda h: h.cos() + h.exp() + h.exp())
    assert three - two == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_also_where_a_backward_pass_runs_within_another(reentrant: bool) -> None:
    def checkpointed(uses: int) -> int:
        def run(h: Tensor) -> Tensor:
            return sum((h.exp() for _ in range(uses)), h.cos())

        return allocations(lambda h: checkpoint(run, h, use_reentrant=reentrant))

    assert checkpointed(3) - checkpointed(2) == 3 + 2, "what is computed again, and no block for the sum"


def test_what_a_custom_functions_backward_adds_is_new() -> None:
    def of(double: Callable[[Tensor], Tensor]) -> int:
        class Doubling(torch.autograd.Function):
            @staticmethod
            def forward(_context: Any, tensor: Tensor) -> Tensor:
                return tensor.clone()

            @staticmethod
            def backward(_context: Any, grad: Tensor) -> Tensor:
                return double(grad * 3)

        return allocations(Doubling.apply)

    assert of(lambda grad: grad + grad) == of(lambda grad: grad * 2)


def test_what_a_hook_adds_is_new() -> None:
    def of(double: Callable[[Tensor], Tensor]) -> int:
        def loss(h: Tensor) -> Tensor:
            h.register_hook(double)
            return h.exp()

        return allocations(loss)

    assert of(lambda grad: grad + grad) == of(lambda grad: grad * 2)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # Tensor.__deepcopy__ does
def test_a_copied_module_is_of_the_same_mode() -> None:
    """PEFT copies modules that it saves whole; a copied mode gives back the same weak references twice."""
    with modelled():
        layer = torch.nn.Linear(8, 8, device=DEVICE)
        copied = copy.deepcopy(layer)
        assert copied.weight.fake_mode is layer.weight.fake_mode
        assert copied.weight.untyped_storage()._cdata != layer.weight.untyped_storage()._cdata


# --- what is known of the host's numbers -------------------------------------------------------


@pytest.mark.parametrize("asked", ["for the first time", "again"])
def test_a_number_of_the_host_is_known_until_it_depends_on_data(asked: str) -> None:
    """Whether FakeTensorMode has made the number's tensor or the cache of operators."""
    with modelled():
        op_cache()._lifted.clear()
        if asked == "again":
            torch.tensor(3.0)
        count, looked_at = torch.tensor(3.0), torch.tensor(3.0)
        count += 1
        assert (count.item(), looked_at.item()) == (4.0, 3.0)
        view = looked_at.view(1)
        view += 2
        assert looked_at.item() == 5.0, "they are one number"
        view += torch.empty(1, device=DEVICE).cpu()
        assert looked_at.item() == 0.0, "what is on the GPU is not known"
        assert count.item() == 4.0


# --- what kernels take for a while -------------------------------------------------------------


def test_the_backward_of_softmax_makes_a_product_first_that_of_its_logarithm_does_not() -> None:
    """Three scores at once instead of two, where a math attention kernel computes the gradient of its own."""
    assert allocations(lambda h: h.softmax(0)) - allocations(lambda h: h.log_softmax(0)) == 1


@pytest.mark.parametrize("softmax", [torch.softmax, torch.log_softmax])
def test_a_softmax_copies_what_is_not_contiguous(softmax: Callable[..., Tensor]) -> None:
    """As if the script had done so."""

    def turned(h: Tensor) -> Tensor:
        return h.view(20, 50).t()

    assert allocations(lambda h: softmax(turned(h), 1)) == allocations(lambda h: softmax(turned(h).contiguous(), 1))


def test_cross_entropy_under_autocast_keeps_its_softmax_in_16_bit(capfd: pytest.CaptureFixture[str]) -> None:
    """CUDA's autocast leaves it to its parts, a CPU's casts its input: measured on an H100, block by block."""
    rows, classes = 64, 1000
    with modelled() as recorder:
        scores = torch.empty(rows, classes, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        before = len(recorder.rows())
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(scores, labels)
        loss.backward()
        sizes = recorder.rows()[before:]["bytes"]
    half, single = rows * classes * 2, rows * classes * 4
    assert [int(size) for size in sizes if size in (half, single)] == [half, single, single, half, half]
    assert "Overriding" not in capfd.readouterr().err


@pytest.mark.parametrize(("contiguous", "scores"), [(True, False), (False, True)])
def test_a_bias_whose_rows_are_not_contiguous_is_left_to_the_math_kernel(contiguous: bool, scores: bool) -> None:
    """T5's comes from a table with the heads last: no fused kernel takes it, and all scores are made."""
    tokens, heads = 64, 4
    with modelled() as recorder:
        query = torch.empty(2, heads, tokens, 16, device=DEVICE, requires_grad=True)
        bias = torch.empty(1, tokens, tokens, heads, device=DEVICE).permute(0, 3, 1, 2)
        before = len(recorder.rows())
        bias = bias.contiguous() if contiguous else bias
        torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=bias)
        made = recorder.rows()[before:]["bytes"]
    assert bool((made == 2 * heads * tokens * tokens * 4).any()) is scores


# --- the same in every process -------------------------------------------------------------------


def test_a_model_that_goes_through_a_set_does_so_in_the_same_order_in_every_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strings hash differently in every process: gemma3's rotary embeddings came in any order."""
    from transformers.models.gemma3 import modeling_gemma3

    kinds = [f"kind_{n}" for n in range(40)]
    fields = {"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}  # fmt: skip
    config = dataclasses.replace(small_run(), architecture=Architecture(fields, "float32"))
    seen: list[list[str]] = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([*vars(modeling_gemma3).get("set", set)(kinds)])
        return original(self, *args, **kwargs)

    original = modeling_gemma3.Gemma3TextModel.forward
    monkeypatch.setattr(modeling_gemma3.Gemma3TextModel, "forward", forward)
    predict(config, H100)
    assert seen and all(order == sorted(kinds) for order in seen)
    assert "set" not in vars(modeling_gemma3), "and nothing is left behind"


# --- versions that are not known ----------------------------------------------------------------


def test_the_installed_bitsandbytes_is_one_that_is_known() -> None:
    assert bitsandbytes_cuda.known()


@pytest.mark.parametrize("settings", [{"quantization": "nf4", "lora": "on"}, {"optimizer": "adamw-8bit"}])
def test_another_bitsandbytes_is_said_not_to_be_predicted(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.77.1" if name == "bitsandbytes" else version(name))
    with pytest.raises(UserError, match=r"^what bitsandbytes 0\.77\.1 allocates on a GPU cannot be predicted"):
        predict(small_run(**settings), H100)
    assert predict(small_run(), H100).peak_bytes > 0, "what does not use it can"


def test_a_library_without_what_is_replaced_is_said_not_to_be_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, "is_tracing")
    with pytest.raises(UserError, match=r"^transformers [\d.]+ cannot be predicted: it has no .*is_tracing$"):
        predict(small_run(), H100)


def test_a_pytorch_whose_sums_of_gradients_are_not_seen_is_said_not_to_be_predicted() -> None:
    blind = kernels(H100)
    del blind[torch.ops.aten.add.Tensor]
    recorder = FakeCuda(blind)
    with (
        cuda_paths(H100, recorder),
        op_cache().mode,
        recorder,
        pytest.raises(UserError, match=r"^torch .* cannot be predicted: how it adds up gradients is not seen$"),
    ):
        recorder.calibrate()
