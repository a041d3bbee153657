"""`gpumem-tui warm`: a process with the libraries loaded, of which every prediction is a copy that begins at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gpumem_tui.engine import engine_registry
from gpumem_tui.engine.engine_registry import EngineDir, EngineLock
from gpumem_tui.engine.prediction import warm_server
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.predictor import PredictingProcess
from gpumem_tui.engine.prediction.questions import Question
from gpumem_tui.engine.prediction.warm_server import WarmProcess, start, warm_process

from .conftest import small_run
from .terminal import until
from .viewing import cli, left_over

H100 = gpu("H100 80GB")


@pytest.fixture(scope="module")
def machine() -> Iterator[tuple[Path, EngineDir]]:
    """A folder for all that is kept, and a server that ends when nobody has asked it for a minute."""
    base = Path(tempfile.mkdtemp(prefix="g-"))  # the path of a socket has to be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(base))
        patch.setenv("XDG_CACHE_HOME", str(base))
        started = start(Question(small_run().as_dict(), H100), idle_s=60)
        yield base, started
        assert cli("stop").stdout == f"{started.name} has ended\n"
        assert not started.folder.exists()
    shutil.rmtree(base)


@pytest.fixture
def server(machine: tuple[Path, EngineDir], monkeypatch: pytest.MonkeyPatch) -> EngineDir:
    """The server, in its environment."""
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(machine[0]))
    return machine[1]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_an_answer_of_the_server_is_that_of_any_process(server: EngineDir) -> None:
    """Several ask at once, each a copy of its own; a copy ends with who asked."""
    config = small_run(lora=True)
    here, info = predict(config, H100), server.info()
    assert info is not None and info.kind == "warm"
    first, second = PredictingProcess(), PredictingProcess(niceness=10)
    with closing(second), closing(first):
        for process in (first, second):
            answer = process.predict(config, H100)
            assert isinstance(process._process, WarmProcess) and isinstance(answer, Prediction)
            assert (answer.by_phase, answer.reserved_bytes) == (here.by_phase, here.reserved_bytes)
        assert len(children(info.pid)) == 2
    until(lambda: not children(info.pid))


PREDICTS_THREE = """
import json, sys
from gpumem_tui.engine import techniques
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.known import predicted
from gpumem_tui.engine.prediction.several import Several

card, configs = gpu("H100 80GB"), [techniques.parse_config(one, "the test") for one in json.load(sys.stdin)]
answers = [predicted(configs[0], card)]
both = Several(card, lambda config: predicted(config, card), processes=2)
for _ in both.work(configs[1:], lambda answer: answers.append(answer) or []):
    pass
print(json.dumps([[one.peak_bytes for one in answers], len(both._processes), "torch" in sys.modules]))
both.close()
"""


def test_what_a_command_predicts_it_asks_the_server_and_loads_no_library(server: EngineDir) -> None:
    configs = [small_run(batch_size=size) for size in (1, 2, 3)]
    code = [sys.executable, "-c", PREDICTS_THREE]
    asked = json.dumps([config.as_dict() for config in configs])
    done = subprocess.run(code, input=asked, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[predict(config, H100).peak_bytes for config in configs], 1, False]


def test_it_is_listed_and_there_is_one(server: EngineDir) -> None:
    assert "warm: predicts" in cli("ps").stdout
    assert cli("warm").stdout == "it is warm already: warm; gpumem-tui stop warm ends it\n"


def test_another_version_or_environment_is_not_answered(server: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    there = warm_process()
    assert there is not None
    there.wait()
    with monkeypatch.context() as patch:
        patch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        assert warm_process() is None
    monkeypatch.setattr(warm_server, "programs", lambda: {"libraries": {"torch": "0.1"}, "code": ""})
    assert warm_process() is None


def test_where_a_server_is_killed_its_copies_end_and_who_asked_goes_on_alone(home: Path) -> None:
    killed, process = start(Question(small_run().as_dict(), H100), idle_s=60), PredictingProcess()
    info = killed.info()
    assert info is not None
    with closing(process):
        process.start()
        assert isinstance(process._process, WarmProcess)
        (copy,) = children(info.pid)
        os.kill(info.pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{copy}").exists())
        assert isinstance(process.predict(small_run(), H100), Prediction)
        assert not isinstance(process._process, WarmProcess)
    engine_registry.clean()
    assert left_over(home) == []


def test_a_server_ends_when_nobody_asks(home: Path) -> None:
    server = start(Question(small_run().as_dict(), H100), idle_s=0.2)
    until(lambda: not server.alive())
    assert left_over(home) == []


def test_it_is_no_engine_to_attach_to(home: Path) -> None:
    """Where there are engines, `stop` without a name means one of them."""
    warm = EngineLock("warm", "warm", 4, "0")
    assert engine_registry.engines() == [] and [one.name for one in engine_registry.warm_servers()] == ["warm"]
    assert engine_registry.find(None, servers=True).name == "warm"
    engine = EngineLock("tiny", "run", 4, "0")
    assert engine_registry.find(None, servers=True).name == "tiny" == engine_registry.find(None).name
    assert engine_registry.find("warm", servers=True).name == "warm"
    assert json.loads((warm.engine_dir.folder / "card.json").read_bytes())["kind"] == "warm"
    for each in (engine, warm):
        each.release()
