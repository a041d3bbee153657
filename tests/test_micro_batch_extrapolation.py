"""Three micro-batches traced for all of them: the same, event for event, as with every micro-batch traced."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.prediction import rehearsal
from gpumem_tui.engine.prediction.micro_batch_extrapolation import TRACED
from gpumem_tui.engine.prediction.rehearsal import Rehearsal, rehearse

from .test_layer_extrapolation import H100, assert_same, run_of


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many micro-batches of a step were traced, attempt by attempt."""
    counts: list[int] = []
    train = rehearsal.train

    def counting(config: RunConfig, workload: Any, *rest: Any) -> None:
        counts.append(workload.recipe.accumulation)
        train(config, workload, *rest)

    monkeypatch.setattr(rehearsal, "train", counting)
    return counts


def assert_as_with_all(few: Rehearsal, all_: Rehearsal) -> None:
    assert_same(few, all_)
    for done in (few, all_):
        assert [trace.micro_batches for trace in done.traces[1:]] == [done.steps[0].rows // 2] * 2
    results = [[dataclasses.replace(step, seconds=0.0) for step in done.steps] for done in (few, all_)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("gpt2", {"accumulation": 4, "lora": True, "checkpointing": "layers", "optimizer": "sgd"}),
        ("tiny", {"accumulation": 8}),
        ("tiny", {"accumulation": 5, "keep_outputs": False, "trainable": "last-layers", "trainable.layers": 3}),
        ("tiny", {"accumulation": 6, "dtype": "mixed-float16", "loss_scaling": True, "loss": "chunked"}),
        ("tiny", {"accumulation": 4, "offload": "activations", "offload.stream": True}),
    ],
    ids=str,
)
def test_all_micro_batches_follow_from_three(model: str, settings: dict[str, Any], traced: list[int]) -> None:
    config = run_of(model, **settings)
    few, all_ = rehearse(config, H100), rehearse(config, H100, every_layer=True)
    assert traced == [TRACED, settings["accumulation"]]
    assert few.traced_layers == (5 if settings.get("trainable") is None else None)
    assert_as_with_all(few, all_)


def test_micro_batches_that_do_not_do_the_same_are_all_traced(
    monkeypatch: pytest.MonkeyPatch, traced: list[int]
) -> None:
    """One forward pass of three keeps something more: the second and the third differ."""
    from transformers.models.gpt_neox import modeling_gpt_neox

    forward = modeling_gpt_neox.GPTNeoXModel.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(self)
        done = forward(self, *args, **kwargs)
        done.last_hidden_state = done.last_hidden_state * 1 if len(passes) % 3 == 2 else done.last_hidden_state
        return done

    passes: list[Any] = []
    monkeypatch.setattr(modeling_gpt_neox.GPTNeoXModel, "forward", other)
    rehearse(run_of("tiny", accumulation=5), H100)
    assert traced == [TRACED, 5]


@pytest.mark.parametrize("settings", [{"accumulation": 3}, {"accumulation": 4, "packing": "padded"}], ids=str)
def test_where_nothing_is_gained_or_rows_differ_all_are_traced(settings: dict[str, Any], traced: list[int]) -> None:
    rehearse(run_of("tiny", **settings), H100)
    assert traced == [settings["accumulation"]]
