"""What quantization does to weights: figures against the libraries' own round trip, published ones and a run."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.device import select
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.weights import bits
from gpumem_tui.engine.weights.checkpoint import open_checkpoint
from gpumem_tui.engine.weights.lens import reports
from gpumem_tui.engine.weights.measurement import Request
from gpumem_tui.engine.weights.process import answered
from gpumem_tui.engine.weights.report import Failed, Measured, ModelEnd, ModelHead, TensorReport
from gpumem_tui.engine.weights.schemes import registry
from gpumem_tui.engine.weights.tensors import stored_transposed
from gpumem_tui.engine.weights.totals import propose
from gpumem_tui.engine.workload import build, prepare
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.cli import main

from .conftest import TINY, Engine, small_run

HERE = {key: scheme for key, scheme in registry().items() if not scheme.unavailable}
Draw = Callable[[], torch.Tensor]


def normal(rows: int = 1024, columns: int = 2048) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def with_outliers(rows: int = 1024, columns: int = 2048) -> torch.Tensor:
    """Ten in a million are thirty times as large."""
    torch.manual_seed(0)
    weights = torch.randn(rows, columns)
    weights.view(-1)[torch.rand(weights.numel()) < 1e-5] *= 30
    return weights


def heavy_tailed() -> torch.Tensor:
    """Rows and columns of unlike size, and tails; rows that end within a run."""
    torch.manual_seed(0)
    sizes = torch.exp(torch.randn(2048, 1) / 2) * torch.exp(torch.randn(1, 896) / 2)
    return torch.distributions.StudentT(8.0).sample((2048, 896)) * sizes


def unlike_rows() -> torch.Tensor:
    """Normal weights, rows of unlike size: a few of them hold most of what lies beyond the quantiles."""
    torch.manual_seed(0)
    return torch.randn(4096, 1024) * torch.exp(torch.randn(4096, 1) / 3)


def measured(folder: Path, weights: torch.Tensor, *keys: str, exact: bool = True) -> TensorReport:
    save_file({"w.weight": weights}, folder / "model.safetensors")
    schemes = [HERE[key] for key in keys or HERE if key in HERE]
    (found,) = reports(open_checkpoint(str(folder)).tensors, schemes, exact)
    return found


# --- the figures are those of the libraries -------------------------------------------


def _affine(weights: torch.Tensor, group: tuple[int, ...], low: int, high: int, symmetric: bool) -> torch.Tensor:
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    mapping = ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC
    scale, zero = ao.choose_qparams_affine(weights, mapping, group, torch.int8, low, high)
    codes = ao.quantize_affine(weights, group, scale, zero, torch.int8, low, high)
    restored: torch.Tensor = ao.dequantize_affine(codes, group, scale, zero, torch.int8, low, high)
    return restored


def _four_bit(weights: torch.Tensor, kind: str, block: int = 64, double: bool = False) -> torch.Tensor:
    packed, state = functional.quantize_4bit(weights, blocksize=block, quant_type=kind, compress_statistics=double)
    restored: torch.Tensor = functional.dequantize_4bit(packed, state)
    return restored


def _dynamic(weights: torch.Tensor) -> torch.Tensor:
    codes, state = functional.quantize_blockwise(weights, blocksize=256)
    restored: torch.Tensor = functional.dequantize_blockwise(codes, state)
    return restored


def _llm_int8(weights: torch.Tensor) -> torch.Tensor:
    codes, scales, _ = functional.int8_vectorwise_quant(weights.half())
    restored: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
    return restored


def _gguf(weights: torch.Tensor, kind: str) -> torch.Tensor:
    gguf = pytest.importorskip("gguf")
    which = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), which), which))


def _fp8(weights: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return (weights * (448 / largest)).to(torch.float8_e4m3fn).float() * (largest / 448)


AT_ONCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8-absmax-tensor": lambda w: _affine(w, tuple(w.shape), -127, 127, True),
    "int8-minmax-tensor": lambda w: _affine(w, tuple(w.shape), -128, 127, False),
    "int8-absmax-row": lambda w: _affine(w, (1, w.shape[1]), -127, 127, True),
    "int8-absmax-block64": lambda w: _affine(w, (1, 64), -127, 127, True),
    "int8-dynamic-block256": _dynamic,
    "llm-int8": _llm_int8,
    "fp8-e4m3-tensor": lambda w: _fp8(w, w.abs().max()),
    "fp8-e4m3-row": lambda w: _fp8(w, w.abs().amax(1, keepdim=True)),
    "fp4": lambda w: _four_bit(w, "fp4"),
    "nf4-block128": lambda w: _four_bit(w, "nf4", 128),
    "nf4": lambda w: _four_bit(w, "nf4"),
    "nf4-block32": lambda w: _four_bit(w, "nf4", 32),
    "nf4-double": lambda w: _four_bit(w, "nf4", double=True),
    "int4-affine-block128": lambda w: _affine(w, (1, 128), -8, 7, False),
    "int4-affine-block64": lambda w: _affine(w, (1, 64), -8, 7, False),
    "int4-affine-block32": lambda w: _affine(w, (1, 32), -8, 7, False),
    "gguf-q8_0": lambda w: _gguf(w, "Q8_0"),
    "gguf-q4_0": lambda w: _gguf(w, "Q4_0"),
}
"""Every scheme whose library quantizes a whole tensor in one call: all but the quantiles, which none has any more."""


@pytest.mark.parametrize("key", AT_ONCE)
def test_a_tensor_in_parts_is_as_far_off_as_the_library_has_it_in_one_call(tmp_path: Path, key: str) -> None:
    assert set(AT_ONCE) == set(registry()) - {"int8-quantile-tensor"}
    weights = heavy_tailed()
    error = (weights - AT_ONCE[key](weights)).double()
    found = measured(tmp_path, weights, key).schemes[key]
    assert found.rmse == pytest.approx(float(error.square().mean().sqrt()), rel=2e-4)
    assert found.largest_error == pytest.approx(float(error.abs().max()), rel=1e-3)


def test_quantile_levels_are_used_alike(tmp_path: Path) -> None:
    found = measured(tmp_path, normal(), "int8-quantile-tensor").schemes["int8-quantile-tensor"]
    assert (found.levels_used, found.levels) == (256, 256)
    assert found.entropy_bits > 7.99
    assert found.wasted_bits == pytest.approx(8 - found.entropy_bits)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(96, 128), (5, 77)])
def test_storage_is_what_bitsandbytes_keeps(kind: str, device: str, shape: tuple[int, int]) -> None:
    weights = torch.randn(*shape, device=device)
    packed, state = functional.quantize_4bit(
        weights, quant_type=kind.removesuffix("-double"), compress_statistics=kind.endswith("double")
    )
    kept = [packed, state.absmax, state.code]
    if state.nested:
        kept += [state.offset, state.state2.absmax, state.state2.code]
    assert registry()[kind].storage_bytes(*shape) == sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4-double", True)])
def test_a_run_allocates_what_the_document_says(
    engine: Engine, kind: str, double: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "--profile", "tiny", "--schemes", kind, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    run = engine.run(small_run(lora="on", quantization="nf4", quantization__double=double, lora__r=1))
    kept = sum(tensor["parameters"] for tensor in document["tensors"] if not tensor["quantized"])
    quantized = sum(tensor["parameters"] for tensor in document["tensors"] if tensor["quantized"])
    float32 = 4 * (run["parameters"] - quantized)  # embeddings, norms, biases, adapters
    assert float32 > 4 * kept
    assert run["loaded"]["by_category"]["parameters"] == float32 + document["total"]["schemes"][kind]["bytes"]


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


# --- what is kept in 16 bit is more memory ------------------------------------------------


def test_a_run_that_keeps_a_module_allocates_what_keeping_it_adds(engine: Engine) -> None:
    quantized = {"lora": "on", "quantization": "nf4", "dtype": "bfloat16"}
    skip = "layers.2.mlp.dense_4h_to_h"
    less, more = (
        engine.run(small_run(**quantized, quantization__skip=name))["loaded"]["by_category"]["parameters"]
        for name in ("none", skip)
    )
    rows, columns = TINY["hidden_size"], TINY["intermediate_size"]
    bias = 2 * rows  # float32 beside quantized weights
    assert more - less == 2 * rows * columns - registry()["nf4-double"].storage_bytes(rows, columns) - bias


def test_a_prediction_knows_which_layers_keep_a_module() -> None:
    """24 layers are predicted from few; one that is unlike the others must not stand for them, or they for it."""
    model, card = run_fields("qwen2.5-0.5b"), gpu("H100 80GB")
    loaded = {}
    for skip in ("none", "layers.3.mlp.down_proj", "down_proj"):
        config = small_run(model, lora="on", quantization="nf4", quantization__skip=skip)
        loaded[skip] = predict(config, card).as_document()["loaded"]["by_category"]["parameters"]
    added = 2 * 896 * 4864 - registry()["nf4-double"].storage_bytes(896, 4864)
    assert loaded["layers.3.mlp.down_proj"] == loaded["none"] + added
    assert loaded["down_proj"] == loaded["none"] + 24 * added


def test_a_module_that_is_not_quantized_cannot_be_kept() -> None:
    for name in ("embed_out", "nothing"):
        with pytest.raises(
            UserError, match=f"quantization.skip: no quantized module is called '{name}'; there are dense"
        ):
            prepare(small_run(quantization__skip=name), select("cpu"))


# --- what others have published ---------------------------------------------------------


PUBLISHED = {  # SQNR in dB, entropy in bits: 4096 x 4096 normal weights with outliers
    "int8-absmax-tensor": (14.4, 2.66),
    "int8-minmax-tensor": (15.0, 2.76),
    "int8-absmax-row": (35.9, 7.09),
    "int8-dynamic-block256": (39.3, 7.24),
    "int8-absmax-block64": (44.2, 7.62),
    "nf4": (20.65, 3.88),
    "fp4": (18.2, 3.72),
}


def test_normal_weights_with_outliers_as_published(tmp_path: Path) -> None:
    found = measured(tmp_path, with_outliers(4096, 4096), *PUBLISHED, "int8-quantile-tensor", exact=False)
    for key in PUBLISHED.keys() & HERE.keys():
        sqnr, entropy = PUBLISHED[key]
        assert found.schemes[key].sqnr_db == pytest.approx(sqnr, abs=0.1), key
        assert found.schemes[key].entropy_bits == pytest.approx(entropy, abs=0.02), key
    assert found.kurtosis > 20
    assert found.largest_sigma > 60


def test_nf4_against_affine_int4_depends_on_the_block(tmp_path: Path) -> None:
    """bitsandbytes #2086: on Qwen2.5-0.5B's weights, a little heavier in the tails than normal ones, affine
    int4 has 1.074, 1.009 and 0.942 times NF4's error in blocks of 128, 64 and 32."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    weights = torch.distributions.StudentT(30.0).sample((1024, 4096)) * 0.02
    keys = {128: "nf4-block128", 64: "nf4", 32: "nf4-block32"}
    found = measured(tmp_path, weights, *keys.values(), *(f"int4-affine-block{block}" for block in keys)).schemes
    ratios = [found[f"int4-affine-block{block}"].rmse / found[key].rmse for block, key in keys.items()]
    assert ratios == pytest.approx([1.074, 1.009, 0.942], abs=0.004)


# --- a sample stands for all --------------------------------------------------------------


@pytest.mark.parametrize("weights", [normal, with_outliers, heavy_tailed, unlike_rows])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sample_is_within_a_tenth_of_a_decibel(tmp_path: Path, weights: Draw, dtype: torch.dtype) -> None:
    drawn = weights().to(dtype)
    sampled, exact = (measured(tmp_path, drawn, exact=exact) for exact in (False, True))
    for key in HERE:
        # Where rows are unlike, the error by quantiles is that of few weights.
        within = 0.2 if (key, weights) == ("int8-quantile-tensor", unlike_rows) else 0.1
        assert sampled.schemes[key].sqnr_db == pytest.approx(exact.schemes[key].sqnr_db, abs=within), key
    assert sampled.std == pytest.approx(exact.std, rel=0.02)
    assert sampled.high == exact.high == drawn.max()
    assert sampled.low == exact.low == drawn.min()


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


def test_weights_that_are_all_zero_come_back_as_zero(tmp_path: Path) -> None:
    for found in measured(tmp_path, torch.zeros(8, 256)).schemes.values():
        assert (found.rmse, found.sqnr_db, found.levels_used, found.entropy_bits) == (0, None, 1, 0)


# --- trained weights ----------------------------------------------------------------------


def test_training_makes_outliers_and_they_cost_a_whole_tensors_scale_most(tmp_path: Path) -> None:
    config = small_run(batch_size=4, seq_len=32, learning_rate=3e-3)
    workload = build(prepare(config, select("cpu")))
    start = workload.model.state_dict()
    save_file({name: start[name].clone() for name in start if start[name].dim() == 2}, tmp_path / "model.safetensors")
    schemes = [HERE[key] for key in ("int8-absmax-tensor", "nf4") if key in HERE]
    before = {report.name: report for report in reports(open_checkpoint(str(tmp_path)).tensors, schemes)}
    for _ in range(60):
        workload.model(**workload.batches.next()).loss.backward()
        workload.optimizer.step()
        workload.optimizer.zero_grad()
    workload.model.save_pretrained(tmp_path)
    trained = [r for r in reports(open_checkpoint(str(tmp_path)).tensors, schemes) if "layers" in r.name]
    for report in trained:
        assert 2.9 < before[report.name].kurtosis < 3.1
    assert max(report.kurtosis for report in trained) > 3.5
    if "int8-absmax-tensor" in HERE:
        lost = {
            scheme.key: max(
                (before[r.name].schemes[scheme.key].sqnr_db or 0) - (r.schemes[scheme.key].sqnr_db or 0)
                for r in trained
            )
            for scheme in schemes
        }
        assert lost["int8-absmax-tensor"] > 3 * lost["nf4"] > 0


def test_what_stands_out_is_proposed_to_be_kept(tmp_path: Path) -> None:
    good, bad = normal(64, 256), normal(64, 256)
    bad[:, ::64] *= 60  # an outlier in each block
    save_file({f"{i}.weight": (bad if i in (2, 5) else good).clone() for i in range(8)}, tmp_path / "model.safetensors")
    nf4 = registry()["nf4"]
    found = propose(list(reports(open_checkpoint(str(tmp_path)).tensors, [nf4])), nf4)
    assert found is not None
    assert (set(found.tensors), set(found.skip.split(","))) == ({"2.weight", "5.weight"}, {"2", "5"})
    assert found.added_bytes == 2 * (2 * good.numel() - nf4.storage_bytes(64, 256))
    assert found.worst_after_db - found.worst_before_db > 0.9
    assert propose(list(reports(open_checkpoint(str(tmp_path)).tensors[:2], [nf4])), nf4) is None


# --- the command ----------------------------------------------------------------------------


def test_the_document_names_every_tensor_and_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.safetensors"
    save_file(
        {"a.weight": normal(64, 256), "a.bias": torch.zeros(64), "position_ids": torch.arange(8)[None]}, file
    )  # fmt: skip
    assert main(["weights", str(file), "--schemes", "all", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["schema"] == "gpumem-weights/1"
    assert "position_ids holds integers" in err
    (tensor,) = document["tensors"]
    assert (tensor["name"], tensor["shape"], tensor["quantized"]) == ("a.weight", [64, 256], True)
    assert set(tensor["schemes"]) == set(HERE) == set(document["total"]["schemes"])
    assert set(document["unavailable"]) == set(registry()) - set(HERE)
    for entry in tensor["schemes"].values():
        assert entry["bits_per_parameter"] == 8 * entry["bytes"] / tensor["parameters"]
        assert 0 < entry["levels_used"] <= entry["levels"]
        assert entry["relative_rmse"] == pytest.approx(10 ** (-entry["sqnr_db"] / 20))
        assert math.log2(entry["levels_used"]) >= entry["entropy_bits"]


def test_a_line_a_tensor_holds_what_its_pictures_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "--profile", "tiny", "--schemes", "nf4", "--jsonl"]) == 0
    head, *tensors, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert [head["kind"], *(line["kind"] for line in tensors), end["kind"]] == ["model", *["tensor"] * 26, "end"]
    assert (head["tensors"], head["random"], len(end["kept"])) == (26, True, 2)
    report = tensors[1]["report"]
    nf4 = report["schemes"]["nf4"]
    assert len(nf4["shares"]) == len(nf4["level_values"]) == 16
    assert nf4["level_values"] == sorted(nf4["level_values"])
    assert sum(nf4["shares"]) == pytest.approx(1, abs=1e-3)
    assert sum(report["density"]) == pytest.approx(1, abs=0.01)


def test_the_table_says_what_is_kept_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights"]) == 0
    text = capsys.readouterr().out
    assert "tiny: 24 matrices of 1,179,648 weights are quantized, 2 kept" in text
    assert "Random weights are normal" in text
    assert "nf4, double quant" in text
    assert "none stands out" in text


def test_a_scheme_whose_package_is_missing_says_so_in_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "gguf" else found(name, *of))
    assert main(["weights", "--schemes", "gguf-q4_0,nf4"]) == 0
    text = capsys.readouterr().out
    missing = registry()["gguf-q4_0"]
    assert re.search(rf"^{re.escape(missing.title)} +–  not installed$", text, re.M)
    assert text.count("the package gguf is not installed: pip install 'gpumem-tui[weights]'") == 1
    assert "suits no tensor" not in text


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


def test_a_file_that_ends_while_it_is_read_names_the_tensor(tmp_path: Path) -> None:
    file = _damaged(tmp_path, "")
    weights = open_checkpoint(str(file))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the file ends within a\.weight"):
        list(reports(weights.tensors, [registry()["nf4"]]))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["/nowhere"], "/nowhere: no such file or folder"),
        (["--model", "{folder}"], "no .safetensors file"),
        (["--schemes", "nf5"], "there is no scheme 'nf5'"),
        (["--profile", "tinny"], "did you mean tiny"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", *(word.format(folder=tmp_path) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert len(err.splitlines()) == 1


def test_explanations_are_at_most_sixty_words() -> None:
    for scheme in registry().values():
        assert len(f"{scheme.explanation} {scheme.formula}".split()) <= 60, scheme.key
