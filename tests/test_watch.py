"""Any training script: watched exactly, at no risk, and left as it was."""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from gpumem_tui.engine import engine_registry, server
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import Category, Phase, StepTrace
from gpumem_tui.engine.feed import Pause, Save, Start, Stop, ViewerRole
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.publisher import RunPublisher
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.remote import Remote
from gpumem_tui.engine.run_events import (
    EngineEnded,
    OutOfMemory,
    Recomputed,
    Refused,
    RunEnded,
    RunEvent,
    RunStarted,
    Saved,
    StepEnded,
)
from gpumem_tui.engine.tracing import hooks
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.engine.tracing.tracer import Tracer
from gpumem_tui.engine.watch import loop, watched_source, watcher
from gpumem_tui.engine.watch import loss as loss_module
from gpumem_tui.engine.watch.leftovers import SCRIPT
from gpumem_tui.engine.watch.loop import WatchedLoop
from gpumem_tui.engine.watch.watched_source import WatchedSource
from gpumem_tui.watch import MemoryCallback, watch

from .examples import accelerate_loop, plain_loop, strangers, trainer_lora
from .terminal import until

# transformers and PEFT still use names that newer transformers call deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore::FutureWarning:(transformers|peft|accelerate)\..*")

EXAMPLES = Path(__file__).parent / "examples"


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> Iterator[None]:
    """Other models are looked for among all objects: those of the test session would cost every test 0.3 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    gc.collect()  # models of the test before are models
    base = Path(tempfile.mkdtemp(prefix="g-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    yield base
    assert engine_registry.engines() == [], "a watched script has left something"
    shutil.rmtree(base)


class Seen:
    """All that was said while scripts were watched."""

    def __init__(self) -> None:
        self.windows: list[WatchedSource] = []
        self.traces: list[StepTrace] = []

    @property
    def ledgers(self) -> list[Ledger]:
        return [Ledger(trace) for trace in self.traces]

    def told(self, kind: type[RunEvent]) -> list[RunEvent]:
        return [m for m in self.windows[-1].events(0) if isinstance(m, kind)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    made = Seen()
    opened, begun = WatchedSource.publish, WatchedSource.__init__

    def begin(self: WatchedSource, name: str | None) -> None:
        begun(self, name)
        made.windows.append(self)
        publish = self._feed.publish_trace

        def keep(trace: StepTrace) -> None:
            publish(trace)
            if not trace.is_open:
                made.traces.append(trace)

        self._feed.publish_trace = keep  # type: ignore[method-assign]

    assert opened
    monkeypatch.setattr(WatchedSource, "__init__", begin)
    return made


def small_model() -> tuple[GPTNeoXForCausalLM, torch.optim.AdamW]:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    # The new name came in with transformers 5.18; the old one warns from then on.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model, torch.optim.AdamW(model.parameters())


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        ids = torch.arange(32).view(2, 16) + step
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    return losses


def hook_tables(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything that hangs on modules and on the optimizer, down to the attributes there are."""
    tables: list[Any] = []
    for thing in (*model.modules(), optimizer):
        tables += [
            (type(thing), name, value.copy() if "hooks" in name else id(value))
            for name, value in vars(thing).items()
            if "hook" in name or callable(value)
        ]
        tables.append(sorted(vars(thing)))
    return tables


# --- exactness ------------------------------------------------------------------------


def check_exact(seen: Seen, script_bytes_max: int = 64) -> None:
    """At every event everything has a name; the sums are the recorder's own at its readings."""
    steps = {m.step: m for m in seen.told(StepEnded)}
    assert [trace.step for trace in seen.traces] == sorted(steps)
    for ledger in seen.ledgers:
        told, after = steps[ledger.trace.step], ledger.after(Phase.OPTIMIZER)
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert ledger.unmatched_frees == 0
        assert after is not None and sum(after.values()) == told.allocated_bytes
        assert ledger.peak.bytes == told.peak_bytes
        held = ledger.by_name(len(ledger.trace.events) - 1, Category.HELD_BY_SCRIPT)
        assert held.get(SCRIPT, 0) <= script_bytes_max, held


def test_a_plain_loop(seen: Seen) -> None:
    losses = plain_loop.main(4)
    check_exact(seen)
    assert [started.watched for started in seen.told(RunStarted)] == [True]
    told = [m.step for m in seen.told(StepEnded)]
    assert told == [1, 2, 3, 4] and len(losses) == 4
    ledger = seen.ledgers[-1]
    after = ledger.after(Phase.OPTIMIZER)
    assert after is not None
    assert after[Category.GRADIENTS] == after[Category.PARAMETERS] > 0
    assert 2 * after[Category.PARAMETERS] <= after[Category.OPTIMIZER_STATE] < 2.1 * after[Category.PARAMETERS]
    assert ledger.peak.by_category[Category.ACTIVATIONS] > 0
    phases = [span.phase for span in ledger.trace.phases]
    assert phases == [Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER]
    assert any(layer.startswith("1") for layer in ledger.by_layer(ledger.peak.event))


def test_a_trainer_with_lora_and_checkpointing(seen: Seen) -> None:
    model = trainer_lora.main(3)
    check_exact(seen, script_bytes_max=4096)  # the loader has the next batch at hand
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    after = seen.ledgers[-1].after(Phase.OPTIMIZER)
    assert after is not None and after[Category.GRADIENTS] == trained
    config = seen.windows[-1].run.config
    assert config is not None
    assert (config["lora"], config["checkpointing"], config["batch_size"]) == (True, "layers", 4)
    recomputed = [m.layers for m in seen.told(Recomputed)]
    assert len(recomputed) == 2 * 3
    assert all(layers[0].endswith(("layers.0", "layers.1")) for layers in recomputed)


def test_an_accelerate_loop_with_accumulation(seen: Seen) -> None:
    accelerate_loop.main(3)
    check_exact(seen, script_bytes_max=4096)  # the data set, and the batch at hand
    assert [trace.micro_batches for trace in seen.traces] == [2, 2, 2]
    assert {span.micro_batch for span in seen.traces[-1].phases} == {0, 1}


def test_what_the_script_keeps_is_said_to_be_the_scripts(seen: Seen) -> None:
    model, optimizer = small_model()
    with watch(model, optimizer):
        kept = [torch.ones(1000)]
        train(model, optimizer, 1)
        kept.append(torch.ones(1000))
        train(model, optimizer, 1)
    last = seen.ledgers[-1]
    assert last.by_name(len(last.trace.events) - 1, Category.HELD_BY_SCRIPT) == {SCRIPT: sum(t.nbytes for t in kept)}


def test_other_models_and_optimizers_are_told_apart_by_name(seen: Seen) -> None:
    """A frozen teacher, an average made after two steps, a discriminator with an optimizer of its own."""
    model, optimizer = small_model()
    teacher, critic = small_model()[0].requires_grad_(False), torch.nn.Linear(16, 1)
    holder = Holder()
    holder.teacher, holder.critic = teacher, critic
    critic_optimizer = torch.optim.Adam(critic.parameters())
    with watch(model, optimizer):
        train(model, optimizer, 2)
        holder.average = average = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            critic(torch.ones(2, 16)).sum().backward()
            critic_optimizer.step()
            train(model, optimizer, 1)
            average.update_parameters(model)
    ledger = seen.ledgers[-1]
    parameters, state, gradients = (
        ledger.by_name(len(ledger.trace.events) - 1, category)
        for category in (Category.PARAMETERS, Category.OPTIMIZER_STATE, Category.GRADIENTS)
    )
    for other in (teacher, average.module):
        owner = "teacher" if other is teacher else "average"
        for name, parameter in other.named_parameters():
            assert parameters[f"{owner}: {name}"] == parameters[name] == parameter.nbytes
    assert state["critic: weight.exp_avg"] == gradients["critic: weight"] == critic.weight.nbytes
    assert ledger.by_layer(-1)["teacher"][Category.PARAMETERS] == sum(p.nbytes for p in teacher.parameters())
    assert sum(ledger.by_name(-1, Category.HELD_BY_SCRIPT).values()) <= 64
    assert ledger.curve[Category.UNKNOWN].max() == 0


class Holder:
    teacher: torch.nn.Module
    critic: torch.nn.Module
    average: torch.nn.Module


def test_an_optimizer_in_backward(seen: Seen) -> None:
    """One optimizer a parameter, stepped as soon as its gradient is there: the step ends with backward."""
    model, _ = small_model()
    optimizers = {p: torch.optim.AdamW([p]) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with watch(model, optimizers):
        for _ in range(3):
            ids = torch.arange(32).view(2, 16)
            model(input_ids=ids, labels=ids).loss.backward()
    check_exact(seen)
    ledger = seen.ledgers[-1]
    held = sum(p.nbytes for p in model.parameters())
    after = ledger.after(Phase.OPTIMIZER)
    assert after is not None and after[Category.OPTIMIZER_STATE] > 2 * held and after[Category.GRADIENTS] == 0
    assert [m.step for m in seen.told(StepEnded)] == [1, 2, 3]


@pytest.mark.parametrize("loop", strangers.LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_of_other_peoples_loops_everything_has_an_owner(loop: Callable[..., None], seen: Seen) -> None:
    try:
        loop(3, "cpu", False)
    except ImportError as error:
        pytest.skip(str(error))
    assert [trace.step for trace in seen.traces] == [1, 2, 3]
    assert not seen.told(Refused), "watching has not failed"
    for ledger in seen.ledgers:
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert ledger.mismatch_bytes == 0
    last = seen.ledgers[-1]
    assert last.curve[Category.HELD_BY_SCRIPT].max() <= 0.01 * last.peak.bytes, last.by_name(
        last.peak.event, Category.HELD_BY_SCRIPT
    )
    assert last.peak.by_category[Category.PARAMETERS] > 0


def test_batch_accumulation_and_loss_are_what_they_are(seen: Seen) -> None:
    """A model that divides its loss by the tokens of all micro-batches, and one that does not."""
    for shares in ({}, {"num_items_in_batch": torch.tensor(4 * 15)}):
        model, optimizer = small_model()
        losses = []
        with watch(model, optimizer):
            for _ in range(2):
                for _ in range(2):
                    ids = torch.arange(32).view(2, 16)
                    loss = model(input_ids=ids, labels=ids, **shares).loss
                    loss.backward()
                    losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model(input_ids=ids, labels=ids)
        run = seen.windows[-1].run
        assert run is not None
        assert [run.config[name] for name in ("batch_size", "seq_len", "accumulation")] == [2, 16, 2]
        steps = seen.told(StepEnded)
        assert [(step.tokens, step.rows) for step in steps] == [(64, 4)] * 2
        expected = sum(losses[:2]) if shares else sum(losses[:2]) / 2
        assert steps[0].loss == pytest.approx(expected)
        assert run.config.architecture is not None and run.config.architecture.config["model_type"] == "gpt_neox"


def test_rows_that_are_no_tokens_are_rows(seen: Seen) -> None:
    strangers.images(2, "cpu", False)
    assert [(step.tokens, step.rows) for step in seen.told(StepEnded)] == [(None, 4)] * 2


def test_inference_is_watched_without_an_optimizer(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    """A step is a generation, with a KV cache that grows, or a forward pass."""
    model = small_model()[0].eval()
    model.config.use_cache = True
    with watch(model, name="used"):
        for _ in range(2):
            model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=3, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)
    steps = seen.told(StepEnded)
    assert [step.tokens for step in steps] == [4 + 1 + 1, 4 + 1 + 1, 4]
    assert [step.loss for step in steps] == [None] * 3
    for ledger in seen.ledgers:
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert {span.phase for span in ledger.trace.phases} <= {Phase.DATA, Phase.FORWARD}
    assert seen.ledgers[0].curve[Category.KV_CACHE].max() > 0
    assert seen.ledgers[2].curve[Category.KV_CACHE].max() == 0
    assert "gpumem-tui: watching GPTNeoXForCausalLM; to see it: gpumem-tui attach used" in capsys.readouterr().err


def test_a_loop_that_never_steps_costs_no_more_the_longer_it_is(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its open step is published in parts, each traced anew."""
    monkeypatch.setattr(loop, "LONGEST_PART", 200)
    monkeypatch.setattr(loop, "LEAST_PASSES", 2)
    model, optimizer = small_model()
    parts: list[int] = []
    publish = WatchedSource.publish
    monkeypatch.setattr(WatchedSource, "publish", lambda s, t: (parts.append(len(t.marks)), publish(s, t)))
    with watch(model, optimizer):
        for _ in range(12):
            ids = torch.arange(32).view(2, 16)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert len(parts) > 3 and max(parts) < 600
    (last,) = seen.ledgers
    assert last.mismatch_bytes == 0 and last.curve[Category.UNKNOWN].max() == 0
    assert seen.told(StepEnded)[0].peak_bytes >= last.peak.bytes  # type: ignore[operator]


# --- no trace of us -------------------------------------------------------------------


def test_unwatching_restores_the_model_and_the_optimizer_exactly(seen: Seen) -> None:
    model, optimizer = small_model()
    train(model, optimizer, 1)
    before = hook_tables(model, optimizer)
    with watch(model, optimizer):
        assert hook_tables(model, optimizer) != before
        train(model, optimizer, 2)
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


def test_a_forked_worker_is_not_watched(seen: Seen) -> None:
    """Nor does it hold the socket open for a script that has died."""
    model, optimizer = small_model()
    with watch(model, optimizer) as watched:
        loader = torch.utils.data.DataLoader(Workers(watched), batch_size=None, num_workers=1)
        assert list(loader) == [[True, 0]]
        assert len(train(model, optimizer, 2)) == 2
    check_exact(seen)


def test_a_forked_child_that_ends_does_not_end_the_watching(seen: Seen) -> None:
    """Nor does it wait for a lock that a thread of its parent's held."""
    model, optimizer = small_model()
    with watch(model, optimizer) as watched:
        train(model, optimizer, 1)
        child = os.fork()
        if not child:
            with watched.source._feed._lock:  # as when it is forked in the middle of an event
                watched.end()
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        train(model, optimizer, 1)
    assert [step.step for step in seen.told(StepEnded)] == [1, 2]


class Workers(torch.utils.data.Dataset[tuple[bool, int]]):
    def __init__(self, watched: watch) -> None:
        self.watched = watched

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[bool, int]:
        sockets = [c for c in psutil.Process().net_connections(kind="unix") if "gpumem-tui" in str(c.laddr)]
        return self.watched.barrier.off, len(sockets)


def test_a_watched_run_trains_as_an_unwatched_one() -> None:
    alone = train(*small_model(), 3)
    model, optimizer = small_model()
    with watch(model, optimizer):
        watched = train(model, optimizer, 3)
    assert watched == alone


def boom(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")


ONCE: list[tuple[Any, str]] = [
    (Tracer, "adopt"), (Tracer, "release"), (watcher.watch, "_install"), (loop, "config_of"),
    (watcher, "device_of"), (WatchedSource, "open"), (WatchedSource, "begin_run"),
]  # fmt: skip
"""What is called once for all that is watched."""

OFTEN: list[tuple[Any, str]] = [
    *[(Tracer, name) for name in ("tag", "own", "own_batch", "own_held", "name", "leaf", "phase", "step")],
    (Tracer, "recomputing"),
    *[(OpTracker, name) for name in ("see", "start", "drain", "stamp", "address", "allocated_bytes", "peak_bytes")],
    *[(hooks, name) for name in ("_enter", "_leave", "_before_backward", "_tensor_in")],
    *[(WatchedLoop, name) for name in ("forward_begins", "forward_ends", "_backward_begins", "optimizer_begins")],
    *[(WatchedLoop, name) for name in ("optimizer_ends", "_begin_step", "look_for_others")],
    *[(loop, name) for name in ("batch_of", "_of_outputs", "find_others")],
    *[(WatchedSource, name) for name in ("publish", "stepped", "recomputed")],
    (watched_source, "name_leftovers"), (loss_module.Losses, "note"), (loss_module.Losses, "read"),
    (OpTracker, "look"), (RunPublisher, "read_gauge"),
]  # fmt: skip


def frozen_model() -> tuple[GPTNeoXForCausalLM, torch.optim.AdamW]:
    """Its embedding is frozen and its inputs require gradients, as under LoRA: leaves that get a `.grad`."""
    model, optimizer = small_model()
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    return model, optimizer


@pytest.mark.parametrize(
    ("where", "name", "good_calls"),
    [*((*fault, 0) for fault in ONCE + OFTEN), *((*fault, 1) for fault in OFTEN)],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_a_fault_in_watching_is_logged_once_and_the_run_goes_on(
    where: Any, name: str, good_calls: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = train(*frozen_model(), 3)
    model, optimizer = frozen_model()
    before = hook_tables(model, optimizer)
    good, calls = getattr(where, name), 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return good(*args, **kwargs) if calls <= good_calls else boom()

    monkeypatch.setattr(where, name, fails)
    with caplog.at_level(logging.WARNING), watch(model, optimizer) as watched:
        assert train(model, optimizer, 3) == alone
        if watched.barrier.off:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
            assert hook_tables(model, optimizer) == before, "the next forward takes everything away"
    assert hook_tables(model, optimizer) == before
    warned = [record.getMessage() for record in caplog.records if record.name == "gpumem_tui.watch"]
    assert calls > good_calls, "the fault was never injected"
    assert len(warned) == 1 and "the run goes on: injected" in warned[0]


@pytest.mark.parametrize("where", [(server.Server, "serve"), (watched_source, "EngineLock")])
def test_a_fault_in_serving_costs_the_viewers_only(
    where: tuple[Any, str], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*where, boom)
    model, optimizer = small_model()
    with watch(model, optimizer):
        assert len(train(model, optimizer, 3)) == 3


def test_exceptions_of_the_script_are_the_scripts(seen: Seen) -> None:
    model, optimizer = small_model()
    with pytest.raises(IndexError), watch(model, optimizer):
        model(input_ids=torch.full((1, 4), 1_000_000))
    assert not seen.told(Refused), "watching itself has not failed"
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer):
        train(model, optimizer, 1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "2.00 GiB" in seen.told(OutOfMemory)[0].text
    with pytest.raises(TypeError, match=r"is no torch\.optim\.Optimizer"):
        watch(model, "adamw")


# Torch's own frames differ wherever a module has a hook; a caption of a group of errors is no source line.
TORCH_FRAME = re.compile(r'^[ |]*File "[^"]*/torch/[^"]*", line \d+, in .*\n(?:[ |]* {4}(?!\+)(?!.*File ").*\n)*', re.M)


def test_errors_of_a_script_are_printed_and_end_it_as_without_watching() -> None:
    """Traceback, cause, notes and exit code; KeyboardInterrupt among them."""
    raising = [sys.executable, str(EXAMPLES / "raising.py")]
    alone = subprocess.Popen(raising, stderr=subprocess.PIPE, text=True)
    watched = subprocess.Popen([*raising, "watched"], stderr=subprocess.PIPE, text=True)
    under_exec = run_under_exec(*raising)
    expected, *told = (TORCH_FRAME.sub("", script.communicate()[1]) for script in (alone, watched, under_exec))
    assert "Traceback" in expected and "\ninterrupted -2\n" in expected and "\nexits 3\n" in expected
    for printed in told:
        ours, theirs = split_lines(printed)
        assert theirs == expected
        assert all("; to see it: gpumem-tui attach raising" in line for line in ours)


def split_lines(printed: str) -> tuple[list[str], str]:
    """The lines that gpumem-tui has said, and the script's own text."""
    lines = printed.splitlines(keepends=True)
    ours = [line for line in lines if line.startswith("gpumem-tui: ")]
    return ours, "".join(line for line in lines if line not in ours)


# --- the other terminal -----------------------------------------------------------------


def test_attach_shows_the_loop_and_toggles_become_advice(seen: Seen, home: Path) -> None:
    model, optimizer = small_model()
    with watch(model, optimizer, name="mine"):
        train(model, optimizer, 2)
        remote = Remote(engine_registry.find("mine"))
        remote.attach()
        until(lambda: remote.run is not None and remote.run.latest is not None and len(remote.run.traces()) == 2)
        config = remote.run.config
        assert remote.role is ViewerRole.WATCHING and config is not None
        assert (config.model, config["checkpointing"], config.batch_size) == ("GPTNeoXForCausalLM", "layers", 2)
        wanted = config.with_({"kv_cache": not config["kv_cache"]})
        with pytest.raises(UserError, match=r"is for your script to set: model\.config\.use_cache; it acts on"):
            remote.command(Start(wanted))
        for command in (Stop(), Pause(True)):
            with pytest.raises(UserError, match="the loop is your own script's"):
                remote.command(command)
        remote.command(Save(home / "mine.gpumem"))
        until(lambda: isinstance(remote.events(0)[-1], Saved))
        assert [t.step for t in Recording(home / "mine.gpumem").run.traces()] == [1, 2]
        train(model, optimizer, 1)
    until(lambda: remote.role is ViewerRole.GONE)
    assert [type(m) for m in remote.events(0)][-2:] == [RunEnded, EngineEnded]
    remote.close()


WITHOUT_DESCRIPTORS = """
import os, resource, torch
model = torch.nn.Linear(4, 4)
torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1).step()  # loads what a first optimizer loads
soft, hard = len(os.listdir("/proc/self/fd")) - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(3):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
print("trained")
"""


def test_a_script_that_has_no_descriptors_left_is_left_alone() -> None:
    script = run_under_exec(sys.executable, "-c", WITHOUT_DESCRIPTORS)
    out, err = script.communicate(timeout=100)
    assert (script.returncode, out) == (0, "trained\n"), err
    (ours,) = [line for line in err.splitlines() if "gpumem" in line]
    assert ours.startswith("gpumem-tui: not watched, the run goes on: "), err


def test_a_training_that_raised_is_unwatched_by_close() -> None:
    model, optimizer = small_model()
    before = hook_tables(model, optimizer)
    callback = MemoryCallback()
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    train(model, optimizer, 1)
    callback.close()
    assert hook_tables(model, optimizer) == before


def run_under_exec(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpumem_tui.tui", "exec", "--", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_script_that_was_not_edited() -> None:
    script = run_under_exec(sys.executable, str(EXAMPLES / "unedited.py"))
    try:
        (engine_dir,) = until(engine_registry.engines)
        remote = Remote(engine_dir)
        remote.attach()
        steps: Callable[[], list[RunEvent]] = lambda: [  # noqa: E731
            m for m in remote.events(0) if isinstance(m, StepEnded)
        ]
        until(lambda: len(steps()) > 3)
        assert engine_dir.name == "unedited"
        assert [m.step for m in steps()[:3]] == [1, 2, 3]
        trace = until(lambda: next((t for t in remote.run.traces() if t.step >= 3), None))
        after = Ledger(trace).after(Phase.OPTIMIZER)
        assert after is not None
        assert after[Category.PARAMETERS] == after[Category.GRADIENTS] == after[Category.OPTIMIZER_STATE] > 0
        stop = subprocess.run(
            [sys.executable, "-m", "gpumem_tui.tui", "stop"], capture_output=True, text=True, check=False
        )
        assert (stop.returncode, "a script of your own" in stop.stderr) == (2, True)
    finally:
        script.send_signal(signal.SIGKILL)
        script.communicate()
    until(lambda: remote.role is ViewerRole.GONE)
    remote.close()
    engine_registry.clean()
    assert [path.name for path in engine_dir.folder.parent.iterdir()] == [".lock"]


def test_a_script_under_exec_ends_as_it_would_without() -> None:
    script = run_under_exec(sys.executable, str(EXAMPLES / "unedited.py"), "3")
    out, err = script.communicate(timeout=60)
    assert (script.returncode, out) == (0, "trained 3\n")
    assert err == "gpumem-tui: watching Net; to see it: gpumem-tui attach unedited\n"
    other = run_under_exec(sys.executable, "-c", "import sys; sys.exit('no training here')")
    assert other.communicate() == ("", "no training here\n") and other.returncode == 1
