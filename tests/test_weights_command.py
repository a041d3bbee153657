"""`gpumem-tui weights`: its document, its table, and what a run of it allocates."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.device import select
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.weights.checkpoint import open_checkpoint
from gpumem_tui.engine.weights.lens import reports
from gpumem_tui.engine.weights.schemes import registry
from gpumem_tui.engine.weights.totals import propose
from gpumem_tui.engine.workload import prepare
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.cli import main

from .conftest import TINY, Engine, small_run
from .drawn_weights import HERE, normal


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


# --- what is kept in 16 bit is more memory ------------------------------------------------


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
