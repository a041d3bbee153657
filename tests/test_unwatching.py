"""Unwatched, a model and its optimizer are what they were: hooks, results, and nothing kept alive."""

from __future__ import annotations

import gc
import weakref

import pytest

from gpumem_tui.watch import MemoryCallback, watch

from .watching import Seen, hook_tables, small_model, train

# transformers and PEFT still use names that newer transformers call deprecated.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::FutureWarning:(transformers|peft|accelerate)\..*"),
    pytest.mark.usefixtures("frozen_heap", "runtime_folder"),
]


def test_unwatching_restores_the_model_and_the_optimizer_exactly(seen: Seen) -> None:
    model, optimizer = small_model()
    train(model, optimizer, 1)
    before = hook_tables(model, optimizer)
    with watch(model, optimizer):
        while_watched = hook_tables(model, optimizer)
        train(model, optimizer, 2)
    assert {key[1:] for key, table in while_watched.items() if table != before[key]} == {
        ("GPTNeoXModel", "_gradient_checkpointing_func"),
        ("GPTNeoXLayer", "_gradient_checkpointing_func"),
        ("AdamW", "_optimizer_step_pre_hooks"),
        ("AdamW", "_optimizer_step_post_hooks"),
        ("Module", "__call__"),
        ("torch.optim.optimizer", "_global_optimizer_pre_hooks"),
        ("torch.optim.optimizer", "_global_optimizer_post_hooks"),
    }
    assert hook_tables(model, optimizer) == before
    with pytest.raises(RuntimeError, match="of their own"), watch(model, optimizer):
        raise RuntimeError("of their own")
    assert hook_tables(model, optimizer) == before


def test_watching_keeps_nothing_alive(seen: Seen) -> None:
    model, optimizer = small_model()
    with watch(model, optimizer) as watched:
        train(model, optimizer, 2)
    alive = [weakref.ref(thing) for thing in (model, optimizer, *model.parameters())]
    del model, optimizer
    gc.collect()
    assert watched.source.events(0)
    assert [reference() for reference in alive] == [None] * len(alive)


def test_a_watched_run_trains_as_an_unwatched_one() -> None:
    alone = train(*small_model(), 3)
    model, optimizer = small_model()
    with watch(model, optimizer):
        watched = train(model, optimizer, 3)
    assert watched == alone


def test_a_training_that_raised_is_unwatched_by_close() -> None:
    model, optimizer = small_model()
    before = hook_tables(model, optimizer)
    callback = MemoryCallback()
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    train(model, optimizer, 1)
    callback.close()
    assert hook_tables(model, optimizer) == before
