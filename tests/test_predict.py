"""Predictions without a GPU: against figures measured on one, and against the CPU to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.reduction import scratch_bytes
from gpumem_tui.engine.prediction.rehearsal import rehearse
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.profiles import preset, run_fields

from .conftest import TINY, Engine, small_run

GIB = 2**30
H100 = gpu("H100 80GB")
REFERENCE = preset("reference")
EXACT = 0.01
"""GiB: what the reference experiment's figures, given to three decimals, have to be met within."""


# --- the reference experiment -------------------------------------------------


@pytest.mark.parametrize("row", REFERENCE.rows, ids=lambda row: row.name)
def test_the_reference_experiment_is_predicted(row: Any) -> None:
    settings = techniques.parse(REFERENCE.settings, REFERENCE.where) | techniques.parse(row.settings, REFERENCE.where)
    predicted = predict(techniques.configure(run_fields(str(REFERENCE.model)), settings), H100)
    bare = row.bare_h100
    # The first row's process had no workspaces yet when its model was loaded.
    workspace = 0.064 if not bare["leftover"] else 0.0
    first_peak, second_peak = (step.peak_bytes for step in predicted.document.steps)
    assert predicted.loaded_bytes / GIB == pytest.approx(bare["loaded"] + workspace, abs=EXACT)
    assert predicted.after_step_bytes / GIB == pytest.approx(bare["after_step"], abs=EXACT)
    assert first_peak / GIB == pytest.approx(bare["peak_first_step"], abs=EXACT)
    assert max(first_peak, second_peak) / GIB == pytest.approx(bare["peak_all_steps"], abs=EXACT)
    assert bare["peak_all_steps"] * GIB < predicted.safe_bound_bytes <= 1.02 * predicted.peak_bytes
    assert predicted.document.unknown_bytes_max == 0


# --- the CPU --------------------------------------------------------------------


def test_a_prediction_sees_what_the_tracker_of_a_real_run_sees(engine: Engine) -> None:
    """The parts of a step in which CUDA does what a CPU does: weights, gradients, state, outputs."""
    config = small_run(optimizer="adamw-single")
    measured = engine.run(config)
    predicted = predict(config, H100).document.as_dict()
    for moment in ("loaded", "after_first_step"):
        real, guess = (document[moment]["by_category"] for document in (measured, predicted))
        for category in (Category.PARAMETERS, Category.BUFFERS, Category.GRADIENTS, Category.KV_CACHE):
            assert guess[category.key] == real[category.key], (moment, category)
        # AdamW counts its steps in tensors of 4 bytes on the host, which on a CPU is the device.
        steps = 4 * len(list_of_parameters(engine)) if moment == "after_first_step" else 0
        assert guess["optimizer_state"] + steps == real["optimizer_state"]
        assert guess["logits_loss"] == real["logits_loss"]


def list_of_parameters(engine: Engine) -> list[str]:
    trace = engine.traces[1]
    ledger = Ledger(trace)
    rows = ledger.blocks[ledger.blocks["category"] == Category.GRADIENTS]
    return sorted({trace.names[row["name"]] for row in rows})


def test_categories_sum_to_the_modelled_allocator_at_every_event() -> None:
    done = rehearse(small_run(checkpointing="layers", lora=True), H100)
    assert [trace.step for trace in done.traces] == [0, 1, 2]
    for trace, result in zip(done.traces[1:], done.steps, strict=True):
        ledger = Ledger(trace)
        assert ledger.unmatched_frees == 0
        assert int(ledger.total.max()) == result.peak_bytes
        assert sum(ledger.end.values()) == int(ledger.total[-1])
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert {span.phase for span in trace.phases} >= {Phase.FORWARD, Phase.RECOMPUTE, Phase.OPTIMIZER}
    assert len(done.recomputes) == 2 * 6


def test_answers_from_memory_are_those_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the cache of operators, event for event."""
    config = small_run(lora=True, quantization="nf4", checkpointing="layers")
    cached = rehearse(config, H100)
    monkeypatch.setattr(
        "gpumem_tui.engine.prediction.op_cache.OpCache.call", lambda _self, func, args, kwargs: func(*args, **kwargs)
    )
    asked = rehearse(config, H100)
    for one, other in zip(cached.traces, asked.traces, strict=True):
        for column in ("address", "bytes", "slack"):
            assert np.array_equal(one.events[column], other.events[column])


def test_nothing_of_a_prediction_stays_behind(engine: Engine) -> None:
    """A real run in the same process sees no patched function."""
    config = small_run(dtype="mixed")
    before = engine.run(config)
    predict(config, H100)
    with pytest.raises(UserError):
        predict(small_run(**{"lora": True, "lora.targets": "nothing_is_called_so"}), H100)
    after = engine.run(config)
    assert [step["peak_bytes"] for step in before["steps"]] == [step["peak_bytes"] for step in after["steps"]]
    with OpTracker():
        assert torch.tensor([1.0], device="cpu").item() == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        *({"optimizer": value} for value in ("adamw-fused", "adamw-8bit", "paged-adamw", "adafactor", "sgd-momentum")),
        *({"lora": True, "quantization": value} for value in ("nf4", "fp4", "int8")),
        {"dtype": "mixed", "attention": "eager"},
        {"checkpointing": "segments", "checkpointing.reentrant": True},
        {"accumulation": 2, "keep_outputs": False},
    ],
    ids=str,
)
def test_every_technique_is_predictable(settings: dict[str, Any]) -> None:
    predicted = predict(small_run(**settings), gpu("RTX 4090"))
    assert predicted.fits
    assert sum(predicted.by_category.values()) == predicted.peak_bytes < predicted.safe_bound_bytes
    assert predicted.by_category in predicted.by_phase.values()
    assert predicted.reserved_bytes >= predicted.peak_bytes
    assert predicted.document.unknown_bytes_max == 0


@pytest.mark.parametrize("settings", [{}, {"checkpointing": "layers"}, {"dtype": "mixed", "batch_size": 1}], ids=str)
def test_flash_attention_is_predicted_without_its_package(settings: dict[str, Any]) -> None:
    """PyTorch has the same kernel built in, and takes it where it can."""
    half = {"dtype": "bfloat16", **settings}
    own, built_in = (
        predict(small_run(attention=kind, **half), gpu("RTX 4090")) for kind in ("flash_attention_2", "sdpa")
    )
    assert own.peak_bytes == built_in.peak_bytes < predict(small_run(attention="eager", **half), H100).peak_bytes
    assert own.document.unknown_bytes_max == 0


def test_flash_attention_is_for_gpus_that_have_it() -> None:
    with pytest.raises(UserError, match=r"compute capability 8\.0: T4 16GB has not"):
        predict(small_run(attention="flash_attention_2", dtype="float16"), gpu("T4"))


def test_paged_state_is_outside_of_the_allocator() -> None:
    plain, paged = (predict(small_run(optimizer=kind), H100) for kind in ("adamw", "paged-adamw"))
    assert plain.managed_bytes == 0
    assert 0 < paged.managed_bytes < plain.by_category["optimizer_state"]
    assert paged.managed_bytes + paged.by_category["optimizer_state"] > plain.by_category["optimizer_state"] * 0.99


def test_without_k_bit_preparation_what_is_not_quantized_stays_as_it_is_loaded() -> None:
    qlora = {"lora": "on", "quantization": "nf4", "dtype": "bfloat16", "kv_cache": "off"}
    prepared, loaded = (predict(small_run(**qlora, quantization__prepared=on), H100) for on in ("on", "off"))
    embeddings = 2 * TINY["vocab_size"] * TINY["hidden_size"]  # and the head
    saved = prepared.by_category["parameters"] - loaded.by_category["parameters"]
    assert 2 * embeddings <= saved < 2 * 1.2 * embeddings
    held, less = (p.by_phase["forward"]["activations"] for p in (prepared, loaded))
    assert less < 0.7 * held, "and no activation becomes float32"


def test_the_scratch_of_a_split_reduction() -> None:
    """Measured on an H200: the gradient of a bias of 2048, summed over 4096 rows of float16."""
    grad = torch.empty(4096, 2048, dtype=torch.float16, device="meta")
    assert scratch_bytes(gpu("H200"), grad, [0]) == (67_108_864, 64)
    assert scratch_bytes(gpu("H200"), grad, [1]) == (0, 0)


def test_layers_that_are_dropped_at_random_are_kept(tmp_path: Path) -> None:
    """OPT asks a random number for each layer whether to skip it; what is drawn is what is expected of it."""
    fields = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "vocab_size": 512}
    fields |= {"num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 64, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"layerdrop": 0.1}))
    predicted = predict(small_run({"model": str(tmp_path), "pretrained": True}), H100).document.as_dict()[
        "after_first_step"
    ]
    assert predicted["by_category"]["gradients"] == predicted["by_category"]["parameters"]
