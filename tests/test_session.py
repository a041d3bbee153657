"""The engine thread: it starts, restarts, holds and ends runs, and no failure of a run is one of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import EndKind, Phase, StepTrace
from gpumem_tui.engine.feed import Feed, Pause, Start, Stop
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.meter import Meter
from gpumem_tui.engine.publisher import RunPublisher
from gpumem_tui.engine.run import EventLog
from gpumem_tui.engine.run_events import (
    Loaded,
    LossNotFinite,
    OutOfMemory,
    Refused,
    RunEnded,
    RunEvent,
    RunFailed,
    RunStarted,
    StepEnded,
)
from gpumem_tui.engine.session import Session
from gpumem_tui.engine.tracing import assembly
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.engine.tracing.tracer import Tracer
from gpumem_tui.engine.workload import prepare
from gpumem_tui.profiles import run_fields

from .conftest import LAYERS, Engine, small_run, wait_until


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session("cpu")
    yield made
    made.close()


def kinds(session: Session) -> list[type[RunEvent]]:
    return [type(m) for m in session.events(0)]


def test_ten_toggles_in_a_row_leak_nothing(session: Session) -> None:
    """As a user would: each change restarts the run while the one before is still training."""
    toggles = [
        {}, {"lora": "on"}, {"lora": "on", "quantization": "nf4"}, {"checkpointing": "layers"},
        {"dtype": "bfloat16"}, {"optimizer": "sgd"}, {"batch_size": 4}, {"optimizer": "adamw-8bit"},
        {"checkpointing": "segments"}, {"kv_cache": "off"}, {"dtype": "mixed"},
    ]  # fmt: skip
    for number, toggle in enumerate(toggles, 1):
        session.command(Start(small_run(steps=0, **toggle)))
        wait_until(lambda n=number: kinds(session).count(RunStarted) == n, session)  # type: ignore[misc]
        wait_until(
            lambda n=number: any(isinstance(m, StepEnded) and m.run == n for m in session.events(0)),  # type: ignore[misc]
            session,
        )
    session.command(Stop())
    wait_until(lambda: kinds(session).count(RunEnded) == len(toggles), session)
    ended = [m for m in session.events(0) if isinstance(m, RunEnded)]
    assert [m.leaked_bytes for m in ended] == [0] * len(toggles)
    assert {m.reason for m in ended} == {"stopped"}


@pytest.mark.parametrize("where", ["forward", "recompute", "backward", "load"])
def test_a_run_is_left_within_a_step_and_leaks_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A step of a large model takes seconds, its loading minutes: whoever toggles does not wait for their end."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    from gpumem_tui.engine.weight_loading import _RandomWeight

    done: list[str] = []
    """Modules entered, or weights read; the command comes while the fifth is, or the last before backward."""

    def next_thing(name: str) -> None:
        done.append(name)
        if len(done) == 5 if where != "backward" else name == "head":
            session.command(Stop())

    def enters(module: torch.nn.Module, _: object) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        if where != "recompute" or recomputing:
            next_thing("head" if getattr(module, "out_features", 0) == 2048 else type(module).__name__)

    reads = _RandomWeight.__getitem__

    def read(self: _RandomWeight, index: object) -> torch.Tensor:
        next_thing(self.name)
        return reads(self, index)

    hook = None
    if where == "load":
        monkeypatch.setattr(_RandomWeight, "__getitem__", read)
    else:
        hook = register_module_forward_pre_hook(enters)
    try:
        checkpointing = "off" if where == "backward" else "layers"
        session.command(Start(small_run(steps=0, checkpointing=checkpointing)))
        wait_until(lambda: RunEnded in kinds(session), session)
    finally:
        if hook is not None:
            hook.remove()
    if where == "backward":  # which has no modules, so the optimizer's step is what is not done any more
        assert done[-1] == "head"
    else:
        assert len(done) <= 6
    ended = session.events(0)[-1]
    assert (ended.reason, ended.steps, ended.leaked_bytes) == ("stopped", 0, 0)
    monkeypatch.undo()
    session.command(Start(small_run(steps=1)))
    wait_until(lambda: kinds(session).count(RunEnded) == 2, session)
    assert session.events(0)[-1].reason == "done"


def test_loading_a_checkpoint_tells_of_every_module_and_can_be_left(checkpoint: Path) -> None:
    """As loading a profile does; transformers tells from 5.5 on."""
    import torch

    from gpumem_tui.engine.workload import build, prepare

    config = replace(small_run(), model=str(checkpoint), pretrained=True)
    told: list[str] = []
    model = build(prepare(config, torch.device("cpu")), told.append).model
    holders = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert set(told) - {""} == holders
    assert told[-1] == ""

    def leave(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(prepare(config, torch.device("cpu")), leave)
    assert torch.get_default_dtype() is torch.float32


def test_each_change_changes_what_fills_the_memory(engine: Engine) -> None:
    def after(**settings: object) -> dict[str, int]:
        sizes: dict[str, int] = engine.run(small_run(**settings))["after_first_step"]["by_category"]
        return sizes

    full = after()
    assert after(lora="on")["optimizer_state"] < full["optimizer_state"] / 10
    assert after(lora="on", quantization="nf4")["parameters"] < full["parameters"]
    assert after(dtype="bfloat16")["gradients"] == full["gradients"] / 2
    assert after(optimizer="sgd")["optimizer_state"] == 0
    assert after(kv_cache="off")["kv_cache"] == 0 < full["kv_cache"]
    assert after(batch_size=4)["logits_loss"] > full["logits_loss"]


def test_what_is_refused_stops_nothing(session: Session) -> None:
    session.command(Start(small_run(steps=0)))
    wait_until(lambda: StepEnded in kinds(session), session)
    with pytest.raises(UserError, match="there is no GPU"):
        session.command(Start(small_run().with_({"optimizer": "paged-adamw"})))
    with pytest.raises(UserError, match="set lora=on"):
        session.command(Start(small_run().with_({"quantization": "nf4"})))
    steps = kinds(session).count(StepEnded)
    wait_until(lambda: kinds(session).count(StepEnded) > steps, session)
    assert kinds(session).count(RunStarted) == 1


def test_a_run_that_cannot_start_gives_way_to_the_one_before(session: Session) -> None:
    session.command(Start(small_run(steps=0)))
    wait_until(lambda: StepEnded in kinds(session), session)
    session.command(Start(small_run(steps=0, lora="on", lora__targets="no_such_module")))
    wait_until(lambda: kinds(session).count(RunStarted) == 3, session)
    failed = next(m for m in session.events(0) if isinstance(m, RunFailed))
    assert "no module is called 'no_such_module'" in failed.text
    config = session.run.config
    assert config is not None and not config["lora"]
    ended = [m for m in session.events(0) if isinstance(m, RunEnded)]
    assert [m.leaked_bytes for m in ended] == [0, 0]


def test_an_exception_in_the_loop_ends_the_run_and_not_the_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpumem_tui.engine.batches import Batches

    good = Batches.next

    def fails_at_the_third(self: Batches) -> object:
        if self.start == 4:
            raise RuntimeError("the loader\nbroke")
        return good(self)

    monkeypatch.setattr(Batches, "next", fails_at_the_third)
    milestones = engine.run_events(small_run(steps=5))
    failure = next(m for m in milestones if isinstance(m, RunFailed))
    assert failure.text == "the loader broke"
    assert "RuntimeError" in failure.detail
    assert milestones[-1].leaked_bytes == 0
    monkeypatch.undo()
    assert engine.run(small_run())["failure"] is None


def test_running_out_of_memory_is_a_milestone_and_the_trace_shows_what_filled_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    engine.run(small_run())
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", out_of_memory)
        milestones = engine.run_events(small_run())
    told = next(m for m in milestones if isinstance(m, OutOfMemory))
    assert "2.00 GiB" in told.text
    assert (told.step, told.phase) == (1, "optimizer step")
    latest = engine.session.run.latest
    assert latest is not None and not latest.is_complete
    assert latest.ending.kind is EndKind.ABORTED and "2.00 GiB" in latest.ending.error
    assert engine.session.run.traces()[-1] is latest, "the step that died is kept"
    ledger = Ledger(latest)
    assert ledger.end[Category.GRADIENTS] == ledger.end[Category.PARAMETERS]


def test_pause_holds_the_loop_and_resume_lets_it_go_on(session: Session) -> None:
    session.command(Start(small_run(steps=0)))
    wait_until(lambda: StepEnded in kinds(session), session)
    session.command(Pause(True))

    def holding() -> bool:
        gauge = session.gauge()
        return gauge is not None and gauge.phase is Phase.IDLE

    wait_until(holding, session)
    session.command(Pause(False))
    steps = kinds(session).count(StepEnded)
    wait_until(lambda: kinds(session).count(StepEnded) > steps + 1, session)


def test_the_first_step_has_the_interpreter_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trace and that of loading are assembled when it has ended."""
    monkeypatch.setattr(assembly, "STILL_S", 60.0)
    published = Published()
    tracer = Tracer(OpTracker(), published, lambda _: None, 1e9)
    with tracer.step(0, 1, True, tuple):
        pass
    with tracer.step(1, 1, True, tuple):
        assert not published.any.wait(0.1)
    with tracer.step(2, 1, True, tuple):
        assert published.any.wait(10)
    tracer.settle()
    tracer.release()
    assert published.steps == [0, 1, 2]


def test_a_run_that_is_held_before_its_first_step_shows_how_it_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "STILL_S", 0.01)
    published = Published()
    tracer = Tracer(OpTracker(), published, lambda _: None, 1e9)
    with tracer.step(0, 1, True, tuple):
        pass
    assert published.any.wait(10)
    tracer.release()


class Card:
    """NVML's figures of a card."""

    device = torch.device("cpu")

    def process_bytes(self) -> int:
        return 2 << 30

    def used_bytes(self) -> int:
        return 3 << 30


@pytest.mark.parametrize(("card", "known"), [(Card(), False), (None, True)], ids=["GPU", "CPU"])
def test_the_context_is_measured_before_the_first_run_alone(card: Any, known: bool) -> None:
    """NVML takes milliseconds: what the run before has measured will do for one that begins."""
    publisher = RunPublisher(Feed())
    publisher._meter = Meter(card, 80 << 30)
    assert publisher.context_is_known is known
    publisher.recorder = OpTracker(memory_limit_bytes=80 << 30)
    publisher.measure_context()
    assert publisher.context_is_known


class Published:
    """Steps whose traces have been assembled."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.any = threading.Event()

    def __call__(self, trace: StepTrace) -> None:
        self.steps.append(trace.step)
        self.any.set()


def test_a_step_takes_no_longer_because_the_run_was_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held_s, clock = 0.0, time.perf_counter

    def hold(_session: Session) -> None:
        nonlocal held_s
        held_s += 1000.0

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + held_s)
    monkeypatch.setattr(Session, "_between", hold)
    document = engine.run(small_run(accumulation=3, steps=2))
    assert held_s == 6000.0
    assert all(step["seconds"] < 1000.0 for step in document["steps"])


def test_an_engine_that_fails_while_cleaning_up_still_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a CUDA error, when every further call to the device fails too."""
    from gpumem_tui.engine import trained_run as module

    def broken() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patch:
        patch.setattr(module.gc, "collect", broken)
        milestones = engine.run_events(small_run())
    assert milestones[-1].text == "CUDA error: device-side assert triggered"
    assert engine.run(small_run())["failure"] is None


def test_a_gpu_asked_for_where_there_is_none() -> None:
    session = Session("cuda:7")
    wait_until(lambda: Refused in kinds(session), session)
    assert "this machine has" in session.events(0)[0].text
    session.close()


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpumem_tui.engine import device

    weights = 4 * 1_714_176
    monkeypatch.setattr(device, "memory_for_a_run_bytes", lambda _: 4 * weights - 1)

    def failure(**settings: object) -> str:
        milestones = engine.run_events(small_run(**settings))
        return next((m.text for m in milestones if isinstance(m, RunFailed)), "")

    assert "does not fit: weights, gradients and optimizer state alone take" in failure()
    assert not failure(optimizer="sgd")
    assert not failure(lora="on")
    monkeypatch.setattr(device, "memory_for_a_run_bytes", lambda _: weights - 1)
    assert "does not fit: its weights alone take" in failure(lora="on")
    assert not failure(lora="on", quantization="nf4")


def test_a_batch_that_cannot_fit_beside_the_model_is_refused_before_anything_is_loaded(engine: Engine) -> None:
    """On a CPU the kernel would end the process."""
    events = engine.run_events(small_run(seq_len=1 << 20, batch_size=4096))
    at, failed = next((n, event) for n, event in enumerate(events) if isinstance(event, RunFailed))
    rows = "batch_size=4096 seq_len=1048576 does not fit: 8 rows and one batch of them take at least"
    assert failed.text.startswith(rows)
    assert not any(isinstance(event, Loaded) for event in events[:at])


def test_logits_that_are_never_made_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpumem_tui.engine import device

    logits = 8 * 1024 * 2048 * (4 + 4)
    monkeypatch.setattr(device, "memory_for_a_run_bytes", lambda _: logits)
    with pytest.raises(UserError, match="batch_size=8 seq_len=1024 does not fit"):
        prepare(small_run(batch_size=8, seq_len=1024), torch.device("cpu"))
    prepare(small_run(batch_size=8, seq_len=1024, loss="chunked"), torch.device("cpu"))


def test_rows_longer_than_a_table_of_learned_positions_are_refused(engine: Engine) -> None:
    events = engine.run_events(small_run(run_fields("gpt2"), seq_len=1025))
    failed = next(event.text for event in events if isinstance(event, RunFailed))
    assert failed == "gpt2 has learned positions for 1024 tokens in a row: seq_len=1025 is too long"


def test_rows_longer_than_the_model_was_made_for_are_said_before_it_is_loaded(engine: Engine) -> None:
    events = engine.run_events(small_run(seq_len=2049, batch_size=1, steps=1, rows=1))
    texts = [event.text for event in events[: next(n for n, e in enumerate(events) if isinstance(e, Loaded))]]
    assert "2049 tokens in a row: the model was made for 2048" in texts


def test_a_loss_that_is_no_number_is_told_once(engine: Engine) -> None:
    events = engine.run_events(small_run(learning_rate=1e30, steps=4))
    told = [event for event in events if isinstance(event, LossNotFinite)]
    assert len(told) == 1
    assert told[0].loss in ("nan", "inf") and told[0].step > 1
    assert told[0].text == f"step {told[0].step}: the loss is {told[0].loss}"
    assert not any(isinstance(event, LossNotFinite) for event in engine.run_events(small_run()))


def test_hooks_undo_themselves_also_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gpumem_tui.engine.tracing.module_hooks import ModuleHooks
    from gpumem_tui.engine.tracing.op_tracker import OpTracker
    from gpumem_tui.engine.tracing.tracer import Tracer

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters())
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")

    def hooks() -> list[Any]:
        return [torch.nn.Module.__call__, *(len(getattr(m, t)) for m in model.modules() for t in tables)]

    before = hooks()
    tracer = Tracer(OpTracker(), lambda _: None, lambda _: None, 1.0)
    tracer.adopt(model, optimizer)
    with pytest.raises(ZeroDivisionError), tracer.attached():
        with tracer.step(1, 1, True, tuple):
            assert hooks() != before
        with tracer.step(2, 1, False, tuple):
            assert hooks() == before, "a step that is not traced costs nothing"
        with tracer.step(3, 1, True, tuple):
            assert hooks() != before
            raise ZeroDivisionError
    assert hooks() == before

    add, third = ModuleHooks.add, model[1]

    def breaks(self: ModuleHooks, module: torch.nn.Module, *functions: Any) -> Any:
        if module is third:
            raise RuntimeError("no hooks here")
        return add(self, module, *functions)

    monkeypatch.setattr(ModuleHooks, "add", breaks)
    with pytest.raises(RuntimeError, match="no hooks here"), tracer.attached(), tracer.step(4, 1, True, tuple):
        pass
    assert hooks() == before
    tracer.release()


@pytest.mark.parametrize(("settings", "said"), [({}, "parameters, all trained, 6."), ({"lora": "on"}, " trained (")])
def test_what_was_loaded_is_told_in_a_line_of_a_small_terminal(
    engine: Engine, settings: dict[str, str], said: str
) -> None:
    (loaded,) = [m for m in engine.run_events(small_run(**settings)) if isinstance(m, Loaded)]
    assert said in loaded.text
    assert " MiB, " in loaded.text
    assert len(loaded.text) <= 69


def test_recomputes_are_told_as_they_happen(engine: Engine) -> None:
    document = engine.run(small_run(checkpointing="segments", checkpointing__every=2, accumulation=2, steps=1))
    told = [(r["micro_batch"], r["layers"]) for r in document["recomputes"]]
    pairs = range(LAYERS - 2, -1, -2)
    back_to_front = [(f"gpt_neox.layers.{i}", f"gpt_neox.layers.{i + 1}") for i in pairs]
    assert told == [(micro, layers) for micro in (0, 1) for layers in back_to_front]
    assert all(r["bytes"] > 0 and r["ms"] > 0 for r in document["recomputes"])


@pytest.mark.parametrize("reentrant", ["off", "on"])
def test_a_recompute_rematerialises_what_the_ledger_calls_recomputed(engine: Engine, reentrant: str) -> None:
    document = engine.run(small_run(checkpointing="input", checkpointing__reentrant=reentrant, steps=1))
    ledger = Ledger(engine.traces[-1])
    (span,) = [s for s in ledger.trace.phases if s.phase is Phase.RECOMPUTE]
    held = ledger.at(span.end - 1)[Category.RECOMPUTED]
    assert document["recomputes"][0]["bytes"] == pytest.approx(held, rel=0.02)


def test_a_feed_forgets_old_steps_and_nothing_else() -> None:
    feed = Feed()
    feed.tell(RunStarted(text="first"))
    for number in range(2 * EventLog.KEPT_FREQUENT + 10):
        feed.tell(StepEnded(text=str(number), step=number))
    kept = feed.events(0)
    assert len(kept) <= 2 * EventLog.KEPT_FREQUENT
    assert kept[0].text == "first"
    assert kept[-1].text == str(2 * EventLog.KEPT_FREQUENT + 9)
    assert [m.index for m in feed.events(kept[-1].index)] == [kept[-1].index]


def test_training_on_a_text_file(engine: Engine, tmp_path: Path, checkpoint: Path) -> None:
    """`--data` with a real tokenizer, saved beside a real checkpoint."""
    text = tmp_path / "corpus.txt"
    text.write_text("the cat sat on the mat " * 60)
    base = {"model": str(checkpoint), "pretrained": True, "data": str(text)}
    document = engine.run(small_run(base, learning_rate=0.01, steps=8))
    losses = [s["loss"] for s in document["steps"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.txt", None, "No such file"),
        ("short.txt", "the cat", "less than one row"),
        ("bad.jsonl", '{"text": "the cat"}\n{"txt": 1}', ":2: not a JSON object with a"),
        ("bytes.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_data_that_cannot_be_used(
    engine: Engine, tmp_path: Path, checkpoint: Path, name: str, content: str | bytes | None, complaint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    base = {"model": str(checkpoint), "pretrained": True, "data": str(path)}
    failure = engine.run(small_run(base))["failure"]
    assert complaint in failure
    assert "\n" not in failure
