"""The ledger: whatever the stream, the categories add up to what the allocator counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import (
    BLOCK,
    COMPLETE,
    EVENT,
    MARK,
    OPEN,
    OWNER,
    SEGMENT,
    AllocatorPool,
    Ending,
    EndKind,
    Phase,
    PhaseSpan,
    StepTrace,
)
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.module_names import LOGITS, LOSS, layer_of, modules_of
from gpumem_tui.engine.run_events import Recomputed
from gpumem_tui.engine.trace_check import check
from gpumem_tui.engine.tracing.buckets import BUCKETS, Buckets, name_buckets

from .fake_source import FakeSource

NAMES = ("", "layers.0.mlp", "layers.1.mlp", LOSS, "layers.0.mlp.weight", LOGITS)


def trace_of(
    events: list[tuple[int, int, int]],
    marks: list[tuple[Phase, int, int]],
    begin: list[tuple[int, int]] = (),  # type: ignore[assignment]
    owners: list[tuple[int, int, Category, int]] = (),  # type: ignore[assignment]
    **more: Any,
) -> StepTrace:
    """A trace from (address, bytes, mark), (phase, micro-batch, name), (address, bytes) and owners."""
    return StepTrace(
        step=1,
        events=np.array([(a, n, 0, m, 0, -1) for a, n, m in events], EVENT),
        marks=np.array(marks, MARK),
        begin=np.array([(a, n, 0, -1) for a, n in begin], BLOCK),
        owners=np.array([(*owner, -1) for owner in owners], OWNER),
        names=NAMES,
        phases=more.pop("phases", ()),
        **more,
    )


FORWARD, BACKWARD = (Phase.FORWARD, 0, 1), (Phase.BACKWARD, 0, 1)
OPTIMIZER = (Phase.OPTIMIZER, 0, 0)


def category_of(trace: StepTrace, row: int = 0) -> Category:
    return Category(int(Ledger(trace).blocks["category"][row]))


def test_made_and_freed_in_forward_is_temporary() -> None:
    assert category_of(trace_of([(1, 8, 0), (1, -8, 0)], [FORWARD])) is Category.TEMPORARIES


def test_made_in_forward_and_freed_in_backward_is_an_activation() -> None:
    assert category_of(trace_of([(1, 8, 0), (1, -8, 1)], [FORWARD, BACKWARD])) is Category.ACTIVATIONS


def test_made_under_recompute_and_freed_in_backward_is_recomputed() -> None:
    recompute = (Phase.RECOMPUTE, 0, 1)
    assert category_of(trace_of([(1, 8, 0), (1, -8, 1)], [recompute, BACKWARD])) is Category.RECOMPUTED


def test_an_owner_names_the_block_alive_at_its_mark_and_no_other() -> None:
    """Address 1 is an activation first and a gradient later: reuse within one step."""
    trace = trace_of(
        [(1, 8, 0), (1, -8, 1), (1, 16, 1), (1, -16, 3)],
        [FORWARD, BACKWARD, BACKWARD, (Phase.ZERO_GRAD, 0, 0)],
        owners=[(1, 2, Category.GRADIENTS, 4)],
    )
    blocks = Ledger(trace).blocks
    assert list(blocks["category"]) == [Category.ACTIVATIONS, Category.GRADIENTS]
    assert NAMES[blocks["name"][1]] == "layers.0.mlp.weight"


def test_what_follows_the_output_embedding_is_logits_and_loss() -> None:
    loss_forward, loss_backward = (Phase.FORWARD, 0, 3), (Phase.BACKWARD, 0, 3)
    trace = trace_of([(1, 8, 0), (2, 8, 1), (1, -8, 1), (2, -8, 1)], [loss_forward, loss_backward])
    assert {*Ledger(trace).blocks["category"]} == {Category.LOGITS_LOSS}


def test_what_nobody_can_name_is_unknown() -> None:
    assert category_of(trace_of([(1, 8, 0)], [BACKWARD])) is Category.UNKNOWN
    assert category_of(trace_of([], [FORWARD], begin=[(1, 8)])) is Category.UNKNOWN


def test_outputs_that_are_kept_keep_their_graph() -> None:
    """A custom autograd function's tensors live until the next outputs replace the old."""
    logits = (9, 0, Category.LOGITS_LOSS, 5)
    kept = trace_of([(1, 8, 0), (9, 8, 0)], [FORWARD, BACKWARD], owners=[logits])
    assert category_of(kept) is Category.ACTIVATIONS
    loss_alone = trace_of([(1, 8, 0), (9, 8, 0)], [FORWARD, BACKWARD], owners=[(9, 0, Category.LOGITS_LOSS, 3)])
    assert category_of(loss_alone) is Category.UNKNOWN
    replaced = trace_of([(1, -8, 0)], [FORWARD], begin=[(1, 8)])
    assert category_of(replaced) is Category.ACTIVATIONS


def test_the_peak_says_when_where_and_of_what() -> None:
    spans = (PhaseSpan(Phase.FORWARD, 0, 0, 2, 0, 0), PhaseSpan(Phase.BACKWARD, 0, 2, 4, 0, 0))
    trace = trace_of(
        [(1, 8, 0), (2, 8, 1), (2, -8, 2), (1, -8, 2)],
        [FORWARD, (Phase.FORWARD, 0, 2), BACKWARD],
        begin=[(5, 100)],
        owners=[(5, 0, Category.PARAMETERS, 4)],
        phases=spans,
    )
    peak = Ledger(trace).peak
    assert (peak.bytes, peak.event, peak.phase, peak.module) == (116, 1, Phase.FORWARD, "layers.1.mlp")
    assert {c: n for c, n in peak.by_category.items() if n} == {Category.PARAMETERS: 100, Category.ACTIVATIONS: 16}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gpt_neox.layers.3.mlp.dense_h_to_4h", "gpt_neox.layers.3"),
        ("base_model.model.model.layers.11.self_attn.q_proj.lora_A.default", "model.layers.11"),
        ("lm_head", "lm_head"),
        ("teacher: gpt_neox.layers.3.mlp.dense.weight", "teacher"),
        ("transformer.h.0", "transformer.h.0"),
        ("base_model", ""),
    ],
)
def test_layer_of(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_what_is_kept_for_a_parameter_is_its_modules_whatever_it_is_called() -> None:
    tensors = frozenset({"rnn.weight_hh_l0_reverse", "h.0.attn.bias", "h.0.A_log", "cls_token", "base_model.model.x.w"})
    names = {
        "rnn": "rnn",
        "rnn.weight_hh_l0_reverse": "rnn",
        "rnn.weight_hh_l0_reverse.exp_avg.0": "rnn",
        "h.0.attn": "h.0.attn",
        "h.0.attn.bias.grad": "h.0.attn",
        "h.0.A_log.absmax": "h.0",
        "cls_token.exp_avg": "",
        "base_model.model.x.w": "x",
        "AdamW.lr": "AdamW.lr",
        "teacher: rnn.weight_hh_l0_reverse": "teacher: rnn.weight_hh_l0_reverse",
    }
    assert modules_of(tuple(names), tensors) == tuple(names.values())


# --- properties ---------------------------------------------------------------


@st.composite
def streams(draw: st.DrawFn) -> StepTrace:
    """Random allocs and frees over few addresses, so that reuse is the rule."""
    alive: dict[int, tuple[int, int]] = {a: (draw(st.integers(1, 99)), draw(st.integers(0, 9))) for a in (1, 2, 3)}
    begin = [(a, n, s, -1) for a, (n, s) in alive.items()]
    events, mark = [], 0
    phases = draw(st.lists(st.sampled_from(list(Phase)), min_size=1, max_size=12))
    for _ in range(draw(st.integers(0, 60))):
        mark = min(mark + draw(st.integers(0, 1)), len(phases) - 1)
        address = draw(st.integers(1, 8))
        if address in alive:
            size, slack = alive.pop(address)
            events.append((address, -size, -slack, mark, 0, -1))
        else:
            alive[address] = draw(st.integers(1, 99)), draw(st.integers(0, 9))
            events.append((address, *alive[address], mark, 0, -1))
    owners = draw(
        st.lists(
            st.tuples(st.integers(1, 8), st.integers(0, len(phases) - 1), st.sampled_from(Category), st.integers(0, 4)),
            max_size=6,
        )
    )
    return StepTrace(
        step=1,
        events=np.array(events, EVENT),
        marks=np.array([(p, 0, i % 4) for i, p in enumerate(phases)], MARK),
        begin=np.array(begin, BLOCK),
        owners=np.array([(*owner, -1) for owner in owners], OWNER),
        names=NAMES,
        phases=(),
        ending=draw(st.sampled_from([OPEN, COMPLETE, Ending(EndKind.ABORTED, "out of memory", 512)])),
    )


@given(streams())
def test_categories_add_up_at_every_event(trace: StepTrace) -> None:
    counted = trace.begin["bytes"].sum() + trace.begin["slack"].sum()
    expected = np.concatenate([[counted], counted + np.cumsum(trace.events["bytes"] + trace.events["slack"])])
    np.testing.assert_array_equal(trace.held_bytes, expected)
    ledger = Ledger(trace)
    np.testing.assert_array_equal(ledger.total, expected)
    assert ledger.curve.min() >= 0
    assert ledger.unmatched_frees == 0
    assert ledger.end == ledger.at(len(trace.events) - 1)
    for event in (-1, len(trace.events) - 1, ledger.peak.event):
        assert sum(ledger.at(event).values()) == expected[event + 1]
        assert sum(sum(sizes.values()) for sizes in ledger.by_layer(event).values()) == expected[event + 1]
        assert int((ledger.alive(event)["bytes"] + ledger.alive(event)["slack"]).sum()) == expected[event + 1]


@given(streams())
def test_every_block_has_one_life(trace: StepTrace) -> None:
    blocks = Ledger(trace).blocks
    assert (blocks["born"] < blocks["died"]).all()
    assert len(blocks) == len(trace.begin) + int((trace.events["bytes"] > 0).sum())


def test_every_pool_has_sums_of_its_own() -> None:
    """Of two streams one takes a second segment within the step, and the other gives its only one back."""
    default, side = AllocatorPool(0, "large"), AllocatorPool(7, "large", (0, 3))
    events = [(1, 90, 10, 0, 0, 0), (2, 50, 0, 0, 0, 1), (2, -50, 0, 0, 0, 1), (3, 30, 5, 0, 0, 0)]
    trace = dataclasses.replace(
        trace_of([], marks=[(Phase.FORWARD, 0, 0)]),
        events=np.array(events, EVENT),
        begin=np.array([(9, 20, 4, 1), (8, 1, 0, -1)], BLOCK),
        segments=np.array([(-1, 0, 100), (-1, 1, 80), (3, 1, -30), (3, 0, 200)], SEGMENT),
        pools=(default, side),
    )
    check(trace)
    ledger = Ledger(trace)
    assert ledger.pools(-1) == [(default, 100, 0, 0), (side, 80, 24, 4)], "what is of no known pool is in none"
    assert ledger.pools(1) == ledger.pools_at_peak == [(default, 100, 100, 10), (side, 80, 74, 4)]
    assert ledger.pools(3) == [(default, 300, 135, 15), (side, 50, 24, 4)]
    assert [held.unused_bytes for held in ledger.pools(3)] == [165, 26]
    assert ledger.describe(0).pool == side and side.name == "large (0, 3)"
    assert Ledger(trace_of([], marks=[])).pools(-1) == []


def test_what_layers_keep_for_backward_is_counted_as_the_last_forward_ends() -> None:
    """Checkpointed layers keep their inputs; what they drop is what is computed again."""
    kept = {}
    for checkpointing in ("off", "layers"):
        source = FakeSource()
        source.start(checkpointing=checkpointing, accumulation=2)
        assert Ledger(source.run.traces()[0]).saved_by_layer is None, "loading has no forward"
        source.finish_step()
        kept[checkpointing] = Ledger(source.run.traces()[-1]).saved_by_layer
        again = {m.layers[0]: m.bytes for m in source.events(0) if isinstance(m, Recomputed)}
    assert kept["off"] == {layer: kept["layers"][layer] + dropped for layer, dropped in reversed(again.items())}


@pytest.mark.parametrize("dies_in", [0, 2])
def test_the_bucket_that_ddp_gives_up_is_one_until_nccl_lets_go_of_it(dies_in: int) -> None:
    """At once, while the new ones are made, or in backward."""
    events = sorted([(1, -100, dies_in), (2, 60, 0), (3, 40, 0), (4, -100, 1)], key=lambda event: event[2])
    trace = trace_of(events, [(Phase.FORWARD, 0, 6), FORWARD, BACKWARD], [(1, 100), (4, 100)])
    trace = dataclasses.replace(trace, names=(*NAMES, BUCKETS))
    found = Ledger(name_buckets(trace, (Buckets((100, 60, 40), are_gradients=False, first=(100,)),))).blocks
    kinds = {int(block["address"]): Category(int(block["category"])) for block in found}
    assert kinds == {1: Category.COMMUNICATION, 2: Category.COMMUNICATION, 3: Category.COMMUNICATION,
                     4: Category.ACTIVATIONS}  # fmt: skip
