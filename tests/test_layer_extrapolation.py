"""A few layers traced for all of them: the same, event for event, as with every layer traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.layers import Layers
from gpumem_tui.engine.prediction.rehearsal import Rehearsal, rehearse
from gpumem_tui.profiles import model_profile, run_fields

H100 = gpu("H100 80GB")


def run_of(model: str, pretrained: bool = False, **settings: Any) -> RunConfig:
    quick = {"batch_size": 2, "seq_len": 64}
    base = {"model": model, "pretrained": True} if pretrained else run_fields(model)
    return techniques.configure(base, techniques.parse(quick | settings, "test"))


def events_of(trace: StepTrace) -> list[list[Any]]:
    """A trace's events; frees with no allocation between them by address: their order makes no difference."""
    events, names = trace.events, np.array(trace.names)
    frees = events["bytes"] < 0
    turn = np.concatenate([[0], np.cumsum(~(frees[1:] & frees[:-1]))])
    order = np.lexsort((events["address"], turn))
    at_work = names[trace.marks["module"][events["mark"]]]
    return [events[column][order].tolist() for column in ("address", "bytes", "slack")] + [at_work[~frees].tolist()]


def assert_same(few: Rehearsal, all_: Rehearsal) -> None:
    for one, other in zip(few.traces, all_.traces, strict=True):
        assert events_of(one) == events_of(other)
        assert one.begin.tolist() == other.begin.tolist()
        assert one.counted == other.counted
        ends = [[(s.phase, s.micro_batch, s.begin, s.end) for s in trace.phases] for trace in (one, other)]
        assert ends[0] == ends[1]
        ledger, expected = Ledger(one), Ledger(other)
        peak = expected.peak
        assert ledger.peak == peak
        assert list(ledger.by_layer(peak.event).items()) == list(expected.by_layer(peak.event).items())
        assert ledger.largest(peak.event) == expected.largest(peak.event)
        assert ledger.end == expected.end
        assert ledger.unmatched_frees == 0
    assert [r._replace(ms=0.0) for r in few.recomputes] == [r._replace(ms=0.0) for r in all_.recomputes]
    outside = ("managed_bytes", "pinned_bytes", "reserved_bytes")
    for name in ("parameters", "trainable_parameters", "workspace_bytes", *outside):
        assert getattr(few, name) == getattr(all_, name), name
    sizes = [[(s.allocated_bytes, s.peak_bytes, s.reserved_bytes) for s in done.steps] for done in (few, all_)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"accumulation": 2, "keep_outputs": False, "kv_cache": False}),
        ("gpt2", {"lora": True, "checkpointing": "layers", "optimizer": "cpu-offload"}),
        ("gpt2", {"checkpointing": "input", "optimizer": "adamw-single"}),
        ("gpt2", {"dtype": "mixed", "optimizer": "adamw-fused"}),
        ("gpt2", {"optimizer": "paged-adamw-8bit", "attention": "eager"}),
        ("gpt2", {"trainable": "last-layers", "trainable.layers": 3, "checkpointing": "layers"}),
        ("gpt2", {"trainable": "norms-biases", "loss": "chunked"}),
        ("gpt2", {"optimizer_in_backward": True, "offload": "activations"}),
        ("gpt2", {"offload": "activations", "offload.stream": True}),
        ("qwen2.5-0.5b", {"lora": True, "quantization": "nf4"}),
        ("qwen2.5-0.5b", {"lora": True, "quantization": "int8", "dtype": "float16"}),
    ],
    ids=str,
)
def test_all_layers_follow_from_a_few(model: str, settings: dict[str, Any]) -> None:
    config = run_of(model, **settings)
    few, all_ = rehearse(config, H100), rehearse(config, H100, every_layer=True)
    assert few.traced_layers == 5 + int(settings.get("trainable.layers", 0))
    assert all_.traced_layers is None
    assert_same(few, all_)


def test_a_segment_of_layers_is_a_period() -> None:
    config = run_of("polyglot-ko-1.3b", **{"checkpointing": "segments", "checkpointing.every": 2})
    few = rehearse(config, H100)
    assert few.traced_layers == 2 + 3 * 2 + 2
    assert_same(few, rehearse(config, H100, every_layer=True))
    assert few.recomputes[0].layers == ("gpt_neox.layers.22", "gpt_neox.layers.23")


def test_layers_that_take_turns_are_a_period() -> None:
    """Gemma 2: every other layer attends to a window only."""
    config = run_of("gemma-2-2b", attention="eager", checkpointing="layers")
    few = rehearse(config, H100)
    assert few.traced_layers == 2 + 3 * 2 + 2
    assert_same(few, rehearse(config, H100, every_layer=True))


def a_folder(where: Path, profile: str, **fields: Any) -> str:
    config = dict(model_profile(profile).config) | {"dtype": "float32"} | fields
    (where / "config.json").write_text(json.dumps(config))
    return str(where)


def test_layers_that_are_not_alike_are_all_traced(tmp_path: Path) -> None:
    """Which layers attend to a window only follows no period here."""
    kinds = ["sliding_attention" if i in (1, 2, 4, 7, 11) else "full_attention" for i in range(12)]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "head_dim": 16}
    folder = a_folder(tmp_path, "gemma-2-2b", layer_types=kinds, **sizes)
    done = rehearse(run_of(folder, pretrained=True, attention="eager"), H100)
    assert done.traced_layers is None
    assert len(done.traces) == 3


def test_layers_that_do_not_do_the_same_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike by their modules, and yet one of them does something else: the requests tells."""
    from transformers.models.gpt2 import modeling_gpt2

    forward = modeling_gpt2.GPT2MLP.forward

    def other(self: Any, hidden_states: Any) -> Any:
        where.append(self)
        return forward(self, hidden_states + 1 if len(where) % 3 == 1 else hidden_states)

    where: list[Any] = []
    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", other)
    assert rehearse(run_of("gpt2"), H100).traced_layers is None


def test_what_grows_with_the_number_of_layers_is_traced_as_it_is(tmp_path: Path) -> None:
    """A mixture of experts whose loss looks at the routers of all layers at once."""
    fields: dict[str, Any] = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
    fields |= {"num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    fields |= {"num_experts_per_tok": 2, "max_position_embeddings": 128, "dtype": "float32"}
    for routers, traced in ((False, 5), (True, None)):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"output_router_logits": routers}))
        config = run_of(str(tmp_path), pretrained=True)
        done = rehearse(config, H100)
        assert done.traced_layers == traced
        assert_same(done, rehearse(config, H100, every_layer=True))


def test_names_in_the_whole_model() -> None:
    layers = Layers("model.layers", head=2, period=2, tail=1, copies=3)
    assert layers.traced == 9
    names = [f"model.layers.{i}.mlp" for i in range(layers.traced)]
    assert list(layers.all_of(names)) == [f"model.layers.{i}.mlp" for i in range(9 + 3 * 2)]
    assert [layers.times(name) for name in names] == [1, 1, 1, 1, 4, 4, 1, 1, 1]
    assert layers.final("model.layers.8.mlp") == "model.layers.14.mlp"
    assert layers.final("layers.6.keys") == "layers.12.keys"
    assert layers.final("lm_head") == "lm_head"
