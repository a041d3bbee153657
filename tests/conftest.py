"""Fixtures: the real engine on the CPU, with the `tiny` profile cut to a batch that takes milliseconds."""

from __future__ import annotations

import os

# Before torch: threads of two workers that spin, or are more than there are cores, starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine import engine_registry, techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.feed import Start
from gpumem_tui.engine.report import Report
from gpumem_tui.engine.run_events import RunEvent
from gpumem_tui.engine.session import Session
from gpumem_tui.engine.watch.watched_source import WatchedSource
from gpumem_tui.profiles import model_profile, run_fields
from gpumem_tui.tui import job_ranks

from .terminal import until
from .viewing import Viewers
from .watching import Seen

job_ranks.FOLDING_S = float("inf")  # a frame shows the same however busy the machine is

TINY = model_profile("tiny").config
LAYERS = TINY["num_hidden_layers"]
SMALL = {"batch_size": 2, "seq_len": 16, "rows": 8, "steps": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def small_run(base: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """A configuration of two quick steps with every step traced."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config = techniques.configure(base or run_fields("tiny"), techniques.parse(SMALL | named, "test"))
    return replace(config, trace="every")


def smaller() -> dict[str, Any]:
    """The tiny profile cut once more, for what takes its time or is done often."""
    config = {**TINY, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 512}
    fields = run_fields("tiny")
    return fields | {"architecture": replace(fields["architecture"], config=config)}


class Engine:
    """One session for many runs, as in the app; each run comes back as its document."""

    def __init__(self, device: str = "cpu") -> None:
        self.report = Report()
        self.traces: list[StepTrace] = []
        self.session = Session(device, self._seen)

    def _seen(self, trace: StepTrace) -> None:
        self.report.add(trace)
        if not trace.is_open:
            self.traces.append(trace)

    def run(self, config: RunConfig) -> dict[str, Any]:
        before = self.session.run
        self.run_events(config)
        number = before.id.number + 1 if before is not None else 1
        return self.report.document(next(run for run in self.session.runs() if run.id.number == number)).as_dict()

    def run_events(self, config: RunConfig) -> list[RunEvent]:
        self.report = Report()
        self.traces.clear()
        before = len(self.session.events(0))
        self.session.command(Start(config))
        assert self.session.wait(120), "the run did not end"
        return list(self.session.events(0))[before:]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.session.close()


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test knows what another has predicted or kept, nor what whoever runs them has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine of one's own: nothing runs on it, and when a test is over nothing of it is left."""
    base = Path(tempfile.mkdtemp(prefix="g-"))  # the path of a socket has to be short
    runtime, temporary = base / "run", base / "tmp"
    for folder in (runtime, temporary):
        folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield base
    for engine_dir in engine_registry.engines():
        info = engine_dir.info()
        assert info is not None
        os.kill(info.pid, signal.SIGKILL)
        until(lambda p=engine_dir: not p.alive())  # type: ignore[misc]
    shutil.rmtree(base)


@pytest.fixture
def viewers(home: Path) -> Iterator[Viewers]:
    made = Viewers()
    yield made
    for viewer in made.all:
        viewer.close()


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """Other models are looked for among all objects: those of the test session would cost every test 0.3 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Watched scripts are served here, and leave nothing when they have ended."""
    gc.collect()  # models of the test before are models
    base = Path(tempfile.mkdtemp(prefix="g-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    yield base
    assert engine_registry.engines() == [], "a watched script has left something"
    shutil.rmtree(base)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """All that is said of scripts while they are watched."""
    made = Seen()
    begun = WatchedSource.__init__

    def begin(self: WatchedSource, *arguments: Any) -> None:
        begun(self, *arguments)
        made.sources.append(self)
        publish = self._feed.publish_trace

        def keep(trace: StepTrace) -> None:
            publish(trace)
            if not trace.is_open:
                made.traces.append(trace)

        self._feed.publish_trace = keep  # type: ignore[method-assign]

    monkeypatch.setattr(WatchedSource, "__init__", begin)
    return made


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a program in a terminal has it: in a shell's background it is ignored, by children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_until(condition: Callable[[], bool], session: Session, seconds: float = 60.0) -> None:
    """Wait for something the engine thread will do; fails loudly instead of hanging."""
    import threading
    import time

    deadline, never = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, [m.text for m in session.events(0)][-5:]
        never.wait(0.01)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real checkpoint on disk, with a tokenizer: what `--model FOLDER` takes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(7)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    words = ["<unk>", "the", "cat", "sat", "on", "mat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder
