"""PEFT's other adapters, and those of a mixture of experts."""

from __future__ import annotations

import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import Architecture, UserError
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict

from .conftest import LAYERS, TINY, Engine, small_run

EXPERTS = Architecture(
    {
        "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32,
        "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    },
    "float32",
    ("q_proj",),
)  # fmt: skip
MIXTURE = {"model": "mixture", "architecture": EXPERTS}
HIDDEN, WIDE = TINY["hidden_size"], 3 * TINY["hidden_size"]  # query_key_value's


@pytest.mark.parametrize(
    ("kind", "of_a_layer"),
    [
        ("rslora", 8 * (HIDDEN + WIDE)),
        ("pissa", 8 * (HIDDEN + WIDE)),
        ("dora", 8 * (HIDDEN + WIDE) + WIDE),  # a magnitude for each row
        ("vera", 8 + WIDE),  # two vectors; the matrices are shared and not trained
        ("ia3", WIDE + 4 * HIDDEN),  # PEFT's own choice of modules: a vector each
        ("prompt", 20 * HIDDEN / LAYERS),
    ],
)
def test_each_kind_trains_as_many_numbers_as_its_paper_says(engine: Engine, kind: str, of_a_layer: float) -> None:
    document = engine.run(small_run(lora="on", lora__kind=kind))
    assert document["trainable_parameters"] == LAYERS * of_a_layer
    assert document["after_first_step"]["by_category"]["gradients"] == 4 * document["trainable_parameters"]


@pytest.mark.parametrize(("kind", "quantization"), [("pissa", "nf4"), ("dora", "int8")])
def test_what_reads_the_weights_itself_takes_no_quantized_ones(kind: str, quantization: str) -> None:
    with pytest.raises(UserError, match=rf"lora\.kind={kind} "):
        small_run(lora="on", lora__kind=kind, quantization=quantization)


@pytest.mark.parametrize("targets", ["q_proj,down_proj", "all-linear"])
@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_experts_in_one_parameter_take_plain_lora_alone(engine: Engine, kind: str, targets: str) -> None:
    dropout = 0.1 if kind == "lora" else 0.0
    settings = {"lora": "on", "lora__kind": kind, "lora__targets": targets, "lora__dropout": dropout}
    document = engine.run(small_run(MIXTURE, **settings))
    assert document["failure"] == (
        "lora.targets: down_proj is all experts in one parameter: set lora.dropout=0 and lora.kind=lora"
    )


@pytest.mark.parametrize(("kind", "quantization"), [("dora", "nf4"), ("vera", "int8")])
def test_adapters_that_copy_or_move_quantized_layers_are_predicted(kind: str, quantization: str) -> None:
    predicted = predict(small_run(lora="on", lora__kind=kind, quantization=quantization), gpu("H100 80GB"))
    plain = predict(small_run(lora="on", quantization=quantization), gpu("H100 80GB"))
    assert predicted.document.unknown_bytes_max == predicted.document.mismatch_bytes_max == 0
    assert predicted.document.parameters != plain.document.parameters
    loaded, expected = (p.document.loaded.by_category["parameters"] for p in (predicted, plain) if p.document.loaded)
    assert loaded == pytest.approx(expected, rel=0.2)


def test_experts_are_adapted_and_predicted(engine: Engine) -> None:
    config = small_run(MIXTURE, lora="on", lora__targets="q_proj,gate_up_proj", lora__dropout=0.0, lora__r=2)
    measured, predicted = engine.run(config), predict(config, gpu("H100 80GB")).document.as_dict()
    assert measured["failure"] is None
    assert measured["unknown_bytes_max"] == predicted["unknown_bytes_max"] == 0
    for category in ("parameters", "gradients"):
        one, other = (d["after_first_step"]["by_category"][category] for d in (measured, predicted))
        assert one == other
    # Of a layer: two matrices beside q_proj, and as many as there are experts beside their first.
    assert measured["trainable_parameters"] == 2 * (2 * (32 + 32) + 4 * 2 * (32 + 32))


def test_every_kind_is_a_change_of_the_training() -> None:
    plain = small_run(lora="on")
    kinds = techniques.all_options()["lora.kind"].choices
    assert all(techniques.effect(plain, plain.with_({"lora.kind": kind})) == 2 for kind in kinds[1:])
