"""The loop of inference: the prompt at once, then token after token, of a run and of a prediction alike.

    load                                  parameters, buffers
    for every token:                      a step
        first of a text: batch            inputs; an empty KV cache
        model(ids, cache)                 activations, temporaries; the KV cache grows
        ids = scores' largest             the next token

The first step of a text is its prefill. After `new_tokens` the next text begins.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .categories import Category
from .config import RunConfig
from .events import Phase
from .kv_caches import grow, kv_cache
from .tracing import owners
from .tracing.tracer import Tracer
from .train import StepResult, autocast
from .workload import Workload


class Held:
    """The loop's own variables, so that a tracer can name what they hold alive."""

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self.cache: Any = None
        self.outputs: Any = None

    def owned(self) -> Iterator[owners.Owned]:
        """Everything held, by category."""
        if self.ids is not None:
            yield Category.INPUTS, "input_ids", self.ids
        yield from owners.of_outputs(self.outputs)
        yield from owners.of_cache(self.cache)


def generate(
    config: RunConfig,
    workload: Workload,
    tracer: Tracer,
    want_trace: Callable[[int], bool],
    between: Callable[[], None],
    on_step: Callable[[StepResult], None],
    tokens: Iterable[int] | None = None,
) -> None:
    """Generate until `config.steps` tokens a row are there, or for ever if that is 0.

    Args:
        config: The run.
        workload: What `build` made of it.
        tracer: Told what is being done.
        want_trace: Whether to trace a step.
        between: Called before every token; holds the loop while it is paused, raises to end it.
        on_step: Called after every token.
        tokens: Numbers of those that are computed; for the others the cache only grows. None: all.
    """
    taken = _arguments(workload.model)
    recorder, held, before = tracer.recorder, Held(), 0
    every = itertools.count(1) if not config.steps else range(1, config.steps + 1)
    with torch.no_grad():
        for step in every if tokens is None else tokens:
            first = (step - 1) % config.new_tokens == 0
            if not first and step - before > 1:
                grow(held.cache, step - before - 1)
            before = step
            between()
            recorder.reset_peak()
            with tracer.step(step, 1, want_trace(step), held.owned):
                began = time.perf_counter()
                with tracer.phase(Phase.DATA):
                    if first:
                        _begin_text(config, workload, held)
                    tracer.own_held(held.owned())
                with tracer.phase(Phase.FORWARD), autocast(workload):
                    assert held.ids is not None
                    held.outputs = workload.call(held.ids, **taken(held.cache))
                    held.ids = held.outputs.logits[:, -1:].argmax(-1)
                    tracer.own_held(held.owned())
                allocated, peak, reserved = recorder.counters()
            rows = config.batch_size
            done = rows * (config.seq_len if first else 1)
            seconds = time.perf_counter() - began
            on_step(StepResult(step, None, seconds, done, rows, allocated, peak, reserved))


def _begin_text(config: RunConfig, workload: Workload, held: Held) -> None:
    held.outputs = held.cache = held.ids = None
    held.ids = workload.batches.next()["input_ids"]
    held.cache = kv_cache(config.text("kv_cache.kind"), workload.model.config, config.row_tokens)


def _arguments(model: Any) -> Callable[[Any], dict[str, Any]]:
    """Arguments of a model beside the ids; the cache's name has changed, older models score every token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return lambda cache: {name: cache, "use_cache": True, **last}
