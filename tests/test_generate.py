"""Inference: the prompt at once, then token after token, run here and predicted for a GPU."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.generate import generate
from gpumem_tui.engine.kv_caches import RESIDUAL, FourBitLayer, grow, kv_cache
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.prediction_text import text
from gpumem_tui.engine.prediction.rehearsal import told_tokens
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.engine.tracing.tracer import Tracer
from gpumem_tui.engine.train import loaded
from gpumem_tui.engine.workload import prepare
from gpumem_tui.profiles import model_profile, run_fields
from gpumem_tui.tui.cli import main

from .conftest import Engine, small_run

H100 = gpu("H100 80GB")
PROMPT, TOKENS = 16, 12


def generation(**settings: Any) -> Any:
    return small_run(**{"workload": "generate", "seq_len": PROMPT, "new_tokens": TOKENS, "steps": TOKENS} | settings)


def held(found: Prediction) -> dict[int, int]:
    """Bytes of the KV cache by the tokens in a row."""
    traces = [trace for trace in found.run.traces() if trace.step]
    return {PROMPT + trace.step - 1: Ledger(trace).end.get(Category.KV_CACHE, 0) for trace in traces}


def bytes_a_token(config: Any) -> int:
    fields = config.architecture.fields()
    return 2 * fields["num_hidden_layers"] * config.batch_size * fields["hidden_size"] * 4  # float32


def test_a_run_generates_and_its_cache_grows_by_a_token_a_step(engine: Engine) -> None:
    config = generation()
    done = engine.run(config)
    assert done["failure"] is None
    assert [step["step"] for step in done["steps"]] == [*range(1, TOKENS + 1)]
    assert all(step["loss"] is None for step in done["steps"])
    assert done["trainable_parameters"] == 0
    assert done["unknown_bytes_max"] == done["leaked_bytes"] == 0
    grown = [step["allocated_bytes"] for step in done["steps"][2:]]
    assert {b - a for a, b in itertools.pairwise(grown)} == {bytes_a_token(config)}


@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized"])
def test_what_is_predicted_of_the_cache_is_what_a_run_holds(engine: Engine, kind: str) -> None:
    config = generation(**{"kv_cache.kind": kind})
    found, done = predict(config, H100), engine.run(config)
    assert found.document.unknown_bytes_max == found.document.mismatch_bytes_max == 0
    last = max(trace.step for trace in engine.session.run.traces())
    measured = Ledger(engine.session.run.traces()[-1]).end[Category.KV_CACHE]
    assert (last, done["unknown_bytes_max"]) == (TOKENS, 0)
    # A GPU's blocks are multiples of 512 bytes; a CPU's are as they are.
    assert held(found)[PROMPT + TOKENS - 1] == pytest.approx(measured, rel=0.02)


def test_of_a_step_under_way_the_cache_is_known_as_far_as_it_has_come() -> None:
    traces: list[StepTrace] = []
    config, tracker = generation(steps=2), OpTracker()
    tracer = Tracer(tracker, traces.append, lambda _: None, publish_every_s=0.0)
    with tracker, loaded(prepare(config, torch.device("cpu")), tracer) as workload:
        generate(config, workload, tracer, lambda _: True, lambda: None, lambda _: None)
    tracer.release()
    *under_way, last = (trace for trace in traces if trace.step == 2)
    assert len(under_way) > 50 and last.is_complete
    whole = Ledger(last)
    for trace in under_way[::10]:
        assert Ledger(trace).end[Category.KV_CACHE] == whole.at(len(trace.events) - 1)[Category.KV_CACHE]


def test_the_tokens_between_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that grows at once ends as one that grows by each token."""
    few = predict(generation(), H100)
    monkeypatch.setattr("gpumem_tui.engine.prediction.rehearsal.told_tokens", lambda count: [*range(1, count + 1)])
    every = predict(generation(), H100)
    assert len(every.document.steps) == TOKENS > len(few.document.steps)
    assert (few.peak_bytes, few.by_category) == (every.peak_bytes, every.by_category)
    assert held(few).items() <= held(every).items()


@pytest.mark.parametrize(("count", "told"), [(1, [1]), (2, [1, 2]), (100, [1, 2, 25, 50, 75, 99, 100])])
def test_the_first_the_last_and_the_quarters_are_gone_through(count: int, told: list[int]) -> None:
    assert told_tokens(count) == told


def test_four_bits_are_near_the_number_and_a_quarter_of_its_bytes() -> None:
    layer, x = FourBitLayer(), torch.randn(2, 2, 8, 64)
    packed = layer._quantize(x, 0)
    assert (layer._dequantize(packed) - x).abs().max() < (x.max() - x.min()) / 15
    assert packed[0].nbytes == x.numel() // 2


@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized"])
def test_a_cache_answers_as_its_model_does_without_one(kind: str) -> None:
    """The next token's scores, from a cache and from the whole row; 4 bit are near."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_profile("tiny").config)).eval()
    ids = torch.randint(0, 100, (1, PROMPT))
    cache = kv_cache(kind, model.config, PROMPT)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(ids[:, :-1], use_cache=True, **{name: cache})
        scores = model(ids[:, -1:], use_cache=True, **{name: cache}).logits[:, -1]
        expected = model(ids).logits[:, -1]
    assert torch.allclose(scores, expected, atol=1e-4 if kind != "quantized" else 0.1)


def test_a_quantized_cache_that_grows_at_once_is_about_to_fill_what_it_keeps_as_it_is() -> None:
    """The highest moment is where it is filled: it is the next one."""
    cache = kv_cache("quantized", AutoConfig.for_model(**model_profile("tiny").config), 0)
    layer = cache.layers[0]
    cache.layers = [layer]
    layer.update(torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 4, 64))
    grow(cache, 500)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (504, RESIDUAL - 1)


def test_estimate_generate_says_how_the_cache_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--profile", "tiny", "--generate", "2", "--batch-size", "2", "--seq-len", "16", "--gpu", "T4"]
    assert main(["estimate", *arguments, "--json", str(tmp_path / "estimate.json")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens in a row" in shown and "largest number of new tokens at this batch size" in shown
    document = json.loads((tmp_path / "estimate.json").read_text())
    assert document["max_new_tokens"] > 2 and document["max_batch_size"] > 2


def test_why_the_peak_has_more_of_the_cache_than_any_token_leaves_is_said() -> None:
    """A layer's keys, or its values, are there as they were beside those that are longer by the token."""
    found = predict(generation(seq_len=2, new_tokens=200, steps=200, batch_size=16), H100)
    most = max(Ledger(trace).end[Category.KV_CACHE] for trace in found.run.traces())
    more = found.by_category["kv_cache"] - most
    assert more == pytest.approx(most / 2 / found.config.architecture.fields()["num_hidden_layers"], rel=0.01)
    assert f"what it had is there as well: {more / 2**20:.1f} MiB more at the peak." in " ".join(str(found).split())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"task": "sequence-classification"}, "is for causal language models"), ({"loss": "chunked"}, "set loss=full")],
)
def test_what_does_not_generate_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        predict(generation(**settings), H100)


def test_rows_that_outgrow_learned_positions_are_refused_before_anything_is_run(engine: Engine) -> None:
    config = small_run(run_fields("gpt2"), workload="generate", seq_len=1000, new_tokens=25)
    said = "gpt2 has learned positions for 1024 tokens in a row: seq_len=1000 and new_tokens=25 are together too long"
    assert engine.run(config)["failure"] == said
    with pytest.raises(UserError, match=f"^{said}$"):
        prepare(config, torch.device("cpu"), shapes_only=True)  # as for a prediction
    prepare(config.with_({"new_tokens": 24}), torch.device("cpu"), shapes_only=True)


def test_rotary_positions_go_on_beyond_those_that_the_model_was_made_for(engine: Engine) -> None:
    config = generation(seq_len=2040, steps=1)
    said = f"{2040 + TOKENS} tokens in a row: the model was made for 2048"
    assert f"{said}." in text(predict(config, H100))
    assert said in [event.text for event in engine.run_events(config)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized"])
def test_generation_on_a_gpu_is_as_predicted(kind: str) -> None:
    from gpumem_tui.engine.prediction.gpu_here import gpu_here

    config, card = generation(**{"kv_cache.kind": kind, "new_tokens": 200, "steps": 200}), gpu_here()
    assert card is not None
    engine = Engine("cuda")
    try:
        found, done = predict(config, card), engine.run(config)
    finally:
        engine.session.close()
    measured = max(step["peak_bytes"] for step in done["steps"])
    assert measured <= found.safe_bound_bytes
    assert found.peak_bytes == pytest.approx(measured, rel=0.005)
