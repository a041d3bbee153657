"""What the app folds of a source, without a terminal: only what is new, never missing a peak."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.run_events import Note
from gpumem_tui.engine.techniques import memory_key
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.event_log import KEPT_EVENTS, Filter
from gpumem_tui.tui.state import ViewState

from .app_driver import trained
from .fake_source import FakeSource


def folded(source: FakeSource) -> ViewState:
    state = ViewState()
    state.update(source, 0.0)
    return state


def test_state_folds_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained(2)
    state = folded(source)
    folds: list[int] = []
    monkeypatch.setattr("gpumem_tui.tui.shown_traces.Ledger", lambda trace: folds.append(trace.step) or Ledger(trace))
    assert not state.update(source, 1.0)
    source.advance()
    assert state.update(source, 2.0)
    assert not state.update(source, 3.0)
    assert folds == [3]


def test_state_never_misses_the_peak_of_a_step_it_did_not_see() -> None:
    source = trained(1)
    state = folded(source)
    source.finish_step()
    highest = Ledger(source.run.traces()[-1]).peak.bytes
    source.finish_step()
    source.advance()
    state.update(source, 1.0)
    assert state.peak is not None
    assert state.peak.peak.bytes == highest
    assert not state.peak.trace.is_open


def test_a_partial_trace_can_hold_the_peak_and_gives_way_to_its_step() -> None:
    source = trained(1)
    state = folded(source)
    source.advance(13)
    state.update(source, 1.0)
    while source.run.latest is not None and source.run.latest.is_open:  # type: ignore[union-attr]
        source.finish_step()
        state.update(source, 2.0)
    assert state.peak is not None
    assert not state.peak.trace.is_open


def test_a_new_run_starts_from_nothing() -> None:
    source = trained(2, checkpointing="layers")
    state = folded(source)
    assert state.run.recomputes
    source.start(batch_size=1)
    state.update(source, 1.0)
    assert state.run.number == 2
    assert not state.run.recomputes
    assert state.peak is not None
    assert state.peak.trace.step == 0
    assert [t.step for t in state.kept] == [0]


def test_milestones_are_read_once_and_bounded() -> None:
    source = trained(1)
    state = folded(source)
    for i in range(KEPT_EVENTS + 10):
        source.feed.tell(Note(text=f"note {i}"))
    state.update(source, 1.0)
    assert len(state.logs[Filter.ALL]) == KEPT_EVENTS
    seen: list[int] = []
    original: Callable[[int], object] = source.events
    source.events = lambda since: (seen.append(since), original(since))[1]  # type: ignore[assignment]
    state.update(source, 2.0)
    assert seen == [state.logs[Filter.ALL][-1].index + 1]


def test_messages_go_by_the_clock() -> None:
    source = trained(1)
    state = folded(source)
    state.say("hello")
    state.update(source, 1.0)
    assert state.message is not None
    state.update(source, 100.0)
    assert state.message is None


def test_runs_that_differ_in_steps_only_hold_the_same() -> None:
    one = techniques.configure(run_fields("tiny"), {"steps": 1})
    two = techniques.configure(run_fields("tiny"), {"steps": 2, "seed": 3})
    assert memory_key(one) == memory_key(two)
    assert memory_key(one) != memory_key(one.with_({"lora": True}))
