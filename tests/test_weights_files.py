"""Files of weights: any float and shape, transposed as GPT-2 has them, damaged, or on the hub."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.weights import bits
from gpumem_tui.engine.weights.checkpoint import open_checkpoint
from gpumem_tui.engine.weights.lens import reports
from gpumem_tui.engine.weights.measurement import Request
from gpumem_tui.engine.weights.process import answered
from gpumem_tui.engine.weights.report import Failed, Measured, ModelEnd, ModelHead
from gpumem_tui.engine.weights.schemes import registry
from gpumem_tui.engine.weights.tensors import stored_transposed
from gpumem_tui.tui.cli import main

from .drawn_weights import HERE, measured, normal
from .whole_tensor_quantizers import AT_ONCE


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 300), (300, 7), (2, 3, 64), (512, 513)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_shape_and_float_is_measured(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    drawn = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8).to(dtype)
    found = measured(tmp_path, drawn, exact=False)
    assert found.shape == shape
    assert found.mean == pytest.approx(float(drawn.double().mean()), abs=1e-3)  # a sample of std 1/8
    for key in HERE:
        assert (key in found.schemes) != (key in found.unsuited)
        if key in found.schemes:
            assert sum(found.schemes[key].shares) == pytest.approx(1, abs=1e-3)
            assert found.schemes[key].entropy_bits > 0 or found.schemes[key].levels_used == 1


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=700),
    columns=st.integers(1, 300),
    start=st.integers(0, 600),
    name=st.sampled_from(["BF16", "F16", "F32"]),
)
@settings(max_examples=60, deadline=None)
def test_extremes_of_bits_are_those_of_the_numbers(values: list[float], columns: int, start: int, name: str) -> None:
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[name]
    tensor, form = torch.tensor(values).to(kind), bits.FORMATS[name]
    raw = tensor.view(torch.int32 if name == "F32" else torch.int16).numpy().view(form.unsigned)
    numbers = tensor.float().numpy()
    assert np.array_equal(bits.as_float32(raw, name), numbers)
    assert bits.as_float32(np.array(bits.range_of(raw, form), form.unsigned), name).tolist() == [
        max(numbers.max(), 0),
        max(-numbers.min(), 0),
    ]
    sizes = bits.magnitudes(raw, form)
    assert np.array_equal(bits.as_float32(sizes, name), np.abs(numbers))
    runs = [np.abs(numbers[i : i + bits.RUN]).max() for i in range(0, len(numbers), bits.RUN)]
    assert bits.as_float32(bits.run_maxima(sizes), name).tolist() == runs
    where, by_row = bits.row_maxima(sizes, columns, start)
    rows = (start + np.arange(len(numbers))) // columns
    assert (where.start, where.stop) == (rows[0], rows[-1] + 1)
    for row, largest in zip(range(where.start, where.stop), bits.as_float32(by_row, name), strict=True):
        assert largest == np.abs(numbers[rows == row]).max()


# --- GPT-2 stores its layers' weights transposed ----------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Conv1D; every output has weights of its own size."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_embd=128, n_layer=2, n_head=2))
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.weight.data *= torch.linspace(0.2, 5, module.nf)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", ["int8-absmax-row", "llm-int8", "nf4"])
def test_what_conv1d_stores_is_measured_as_it_is_quantized(gpt2: Path, key: str) -> None:
    """transformers gives bitsandbytes its transpose: a row, or a block, is of one output."""
    if key not in HERE:
        pytest.skip("torchao is not installed")
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    found = {report.name: report for report in reports(open_checkpoint(str(gpt2)).tensors, [HERE[key]], True)}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            report = found[f"{name}.weight"]
            weights = module.weight.data.T.contiguous()
            error = (weights - AT_ONCE[key](weights)).double()
            assert (report.transposed, report.shape) == (True, tuple(module.weight.shape))
            assert report.schemes[key].rmse == pytest.approx(float(error.square().mean().sqrt()), rel=2e-4)
    assert not found["transformer.wte.weight"].transposed


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_conv1d_takes_what_transformers_stores(gpt2: Path, kind: str) -> None:
    config = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4", bnb_4bit_quant_type="nf4")
    model = GPT2LMHeadModel.from_pretrained(gpt2, quantization_config=config)
    key = "llm-int8" if kind == "int8" else "nf4"
    found = {report.name: report for report in reports(open_checkpoint(str(gpt2)).tensors, [HERE[key]])}
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "source_cls")}
    assert len(layers) == 8
    for name, layer in layers.items():
        state = layer.weight.quant_state if kind == "nf4" else None
        scales = [layer.weight.SCB] if state is None else [state.absmax, state.code]
        stored = sum(tensor.nbytes for tensor in (layer.weight, *scales))
        assert found[f"{name}.weight"].schemes[key].storage_bytes == stored


def test_a_bias_says_which_dimension_the_outputs_are() -> None:
    shapes = {
        "h.0.attn.weight": (8, 24), "h.0.attn.bias": (24,),
        "h.0.proj.weight": (8, 8), "h.0.proj.bias": (8,),
        "vision.fc.weight": (32, 8), "vision.fc.bias": (32,),
        "vision.out.weight": (8, 8), "vision.out.bias": (8,),
        "lm_head.weight": (99, 8),
    }  # fmt: skip
    assert stored_transposed(shapes) == {"h.0.attn.weight", "h.0.proj.weight"}


def test_nan_in_a_transposed_matrix_is_where_the_file_has_it(tmp_path: Path) -> None:
    weights = normal(8, 24)
    weights[3, 5] = math.nan
    save_file({"c_fc.weight": weights, "c_fc.bias": torch.zeros(24)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"c_fc.weight holds NaN at \[3, 5\]"):
        list(reports(open_checkpoint(str(tmp_path)).tensors, [HERE["nf4"]]))


# --- what is wrong is told in one line --------------------------------------------------


def _damaged(folder: Path, how: str) -> Path:
    file = folder / "model.safetensors"
    tensor = normal(64, 256)
    if how == "NaN":
        tensor[3, 5] = math.nan
    elif how == "an infinity":
        tensor[3, 5] = -math.inf
    elif how == "1e+30":
        tensor[3, 5] = 1e30
    elif how == "holds integers":
        tensor = tensor.to(torch.int8)
    save_file({"a.weight": tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor}, file)
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    if how == "beyond the end":
        content = content[:-100]
    elif how == "is not JSON":
        content = content[:20] + b"\xff" + content[21:]
    elif how == "longer than the file":
        content = b"\xff" * 8 + content[8:]
    elif how in ("not those of", "not complete"):
        entry: dict[str, Any] = header["a.weight"]
        entry |= {"shape": [64, 255]} if how == "not those of" else {"data_offsets": [0]}
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + content[-64 * 256 * 2 :]
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("NaN", "a.weight holds NaN at [3, 5]"),
        ("an infinity", "a.weight holds an infinity at [3, 5]"),
        ("holds integers", "a.weight holds integers (I8)"),
        ("beyond the end", "a.weight lies beyond the end"),
        ("not those of", "a.weight has 32768 bytes"),
        ("not complete", "a.weight is not complete"),
        ("1e+30", "a.weight holds 1e+30 at [3, 5]: its weights cannot be quantized"),
        ("is not JSON", "model.safetensors"),
        ("longer than the file", "model.safetensors"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_tensor(
    tmp_path: Path, how: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", str(_damaged(tmp_path, how))]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert how in err
    assert named in err


def test_a_file_that_ends_while_it_is_read_names_the_tensor(tmp_path: Path) -> None:
    file = _damaged(tmp_path, "")
    weights = open_checkpoint(str(file))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the file ends within a\.weight"):
        list(reports(weights.tensors, [registry()["nf4"]]))


def test_the_app_measures_a_model_of_the_hub_where_it_lies_and_never_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    request = Request("an-owner/a-model", None, exact=False)
    hint = "an-owner/a-model is not on this machine: gpumem-tui weights --model an-owner/a-model downloads it"
    assert list(answered(request)) == [Failed(text=hint)]
    cached = tmp_path / "models--an-owner--a-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    assert list(answered(request)) == [Failed(text=hint)]  # a run has looked at its configuration only
    save_file({"w.weight": normal(8, 64)}, cached / "snapshots" / "abc" / "model.safetensors")
    assert [type(entry) for entry in answered(request)] == [ModelHead, Measured, ModelEnd]
