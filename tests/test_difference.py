"""What two peaks differ by: named terms that add up to the byte, of runs and of their predictions."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.difference import Owned, compare, difference, from_document, owned, owner_kind
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.gpus import gpu_of
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.report import report
from gpumem_tui.tui.commands.common import opened

from .app_driver import RECORDINGS
from .conftest import Engine, small_run

RECORDED = ["full", "checkpointed", "lora", "h100-tiny", "h100-tiny-lora"]
MEASURED = ["h100-tiny", "h100-tiny-lora"]
"""On a real H100."""

OWNED = st.dictionaries(
    st.sampled_from(list(Category)),
    st.dictionaries(st.sampled_from([*"abcdefghijkl", ""]), st.integers(1, 1 << 40), min_size=1),
)


def document_of(replay: Recording) -> dict[str, Any]:
    return report(replay.run).as_dict()


# --- adding up ------------------------------------------------------------------------


@given(OWNED, OWNED, st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_terms_add_up_to_their_category_and_categories_to_the_total(base: Owned, other: Owned, named: int) -> None:
    parts = difference(base, other, named)
    total = sum(sum(kinds.values()) for kinds in other.values()) - sum(sum(kinds.values()) for kinds in base.values())
    assert sum(part.difference_bytes for part in parts) == total
    for part in parts:
        assert sum(term.difference_bytes for term in part.terms) == part.difference_bytes
        assert len(part.terms) <= named + 1
        named_terms = [abs(term.difference_bytes) for term in part.terms if term.owners == 1]
        assert named_terms == sorted(named_terms, reverse=True), "largest first"
        assert all(named_terms), "an owner that holds as much as before is no term"


@given(OWNED, OWNED)
@settings(max_examples=100, deadline=None)
def test_the_other_way_round_every_sign_is_the_other(base: Owned, other: Owned) -> None:
    forth, back = difference(base, other), difference(other, base)
    for one, two in zip(forth, back, strict=True):
        assert one.category is two.category
        assert [(t.name, t.difference_bytes) for t in one.terms] == [(t.name, -t.difference_bytes) for t in two.terms]


def test_a_run_differs_from_itself_by_nothing() -> None:
    held = {Category.GRADIENTS: {"a": 4, "b": 2}}
    (part,) = difference(held, held)
    assert (part.difference_bytes, part.terms) == (0, ())


@pytest.mark.parametrize("name", RECORDED)
def test_owners_hold_what_the_categories_hold_slack_too(name: str) -> None:
    for trace in Recording(RECORDINGS / f"{name}.gpumem").run.traces():
        ledger = Ledger(trace)
        for event in {-1, len(trace.events) // 2, ledger.peak.event, len(trace.events) - 1}:
            held = owned(ledger, event)
            assert {c: sum(kinds.values()) for c, kinds in held.items()} == {
                c: size for c, size in ledger.at(event).items() if size
            }


def test_real_slack_has_owners() -> None:
    """The recordings above would not show it if nobody's blocks were ever rounded."""
    ledger = Ledger(Recording(RECORDINGS / "h100-tiny.gpumem").run.traces()[-1])
    assert len(owned(ledger, ledger.peak.event)[Category.SLACK]) > 1


@pytest.mark.parametrize(
    ("owner", "kind"),
    [
        ("gpt_neox.layers.3.mlp.dense.weight", "gpt_neox.layers.*.mlp.dense.weight"),
        ("model.layers.12", "model.layers.*"),
        ("model.layers.0.mlp.experts.7.w1", "model.layers.*.mlp.experts.*.w1"),
        ("base_model.model.lm_head.lora_A.default.weight", "lm_head.lora_A.default.weight"),
        ("conv2d.1x1.weight", "conv2d.1x1.weight"),
        ("logits", "logits"),
        ("", ""),
    ],
)
def test_layers_that_repeat_are_one_owner(owner: str, kind: str) -> None:
    assert owner_kind(owner) == kind


# --- two runs, and a run and its prediction -------------------------------------------


def check(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """The difference of two documents, looked at from every side."""
    found = compare(predicted, measured)
    assert found["bytes"] == measured["peak"]["allocated_bytes"] - predicted["peak"]["allocated_bytes"]
    assert sum(part["bytes"] for part in found["by_category"].values()) == found["bytes"]
    for key, part in found["by_category"].items():
        before, after = (document["peak"]["by_category"][key] for document in (predicted, measured))
        assert (part["predicted_bytes"], part["measured_bytes"], part["bytes"]) == (before, after, after - before)
        assert sum(term["bytes"] for term in part["terms"]) == part["bytes"]
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.mark.parametrize("name", MEASURED)
def test_a_run_on_a_gpu_against_its_prediction(name: str) -> None:
    replay = opened([RECORDINGS / f"{name}.gpumem"])
    measured, config, environment = document_of(replay), replay.run.config, replay.environment()
    assert config is not None and environment is not None
    prediction = predict(config, gpu_of(environment))
    found = check(prediction.document.as_dict(), measured)
    assert abs(found["bytes"]) < prediction.peak_bytes // 1000
    places = found["predicted_peak"], found["measured_peak"]
    assert {(place["phase"], place["module"]) for place in places} == {("backward", "loss")}


def test_what_was_not_foreseen_has_its_name_and_its_size() -> None:
    measured = document_of(Recording(RECORDINGS / "h100-tiny.gpumem"))
    predicted = copy.deepcopy(measured)
    kept = predicted["peak"]["by_owner"]["kv_cache"]
    (first, *_) = kept
    kept[first] -= 4096
    predicted["peak"]["by_category"]["kv_cache"] -= 4096
    predicted["peak"]["allocated_bytes"] -= 4096
    found = check(predicted, measured)
    differing = {key: part["terms"] for key, part in found["by_category"].items() if part["terms"]}
    assert differing == {"kv_cache": [{"name": first, "bytes": 4096, "owners": 1}]}


def test_two_measured_runs_differ_by_what_the_technique_takes_away(engine: Engine) -> None:
    plain, fused = (engine.run(small_run(optimizer=name)) for name in ("adamw", "adamw-fused"))
    found = check(plain, fused)
    temporaries = found["by_category"]["temporaries"]
    assert temporaries["bytes"] < 0
    assert temporaries["terms"][0]["name"] == "AdamW"


def test_a_document_says_who_holds_what_and_how_high_each_phase_went(engine: Engine) -> None:
    document = engine.run(small_run(checkpointing="layers"))
    held = {c.key: sum(kinds.values()) for c, kinds in from_document(document["peak"]).items()}
    assert held == {key: size for key, size in document["peak"]["by_category"].items() if size}
    highest = document["highest_by_phase"]
    assert max(highest.values()) == document["peak"]["allocated_bytes"]
    assert {"load", "forward", "recompute", "backward", "optimizer"} <= set(highest)
    assert highest["optimizer"] >= document["after_first_step"]["allocated_bytes"] > highest["load"]
