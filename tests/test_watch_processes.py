"""Watching across processes: a viewer attached, workers forked, scripts that were not edited."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from gpumem_tui.engine import engine_registry
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.feed import Pause, Save, Start, Stop, ViewerRole
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.remote import Remote
from gpumem_tui.engine.run_events import EngineEnded, RunEnded, RunEvent, Saved, StepEnded
from gpumem_tui.engine.watch.exec_report import NOTHING_WATCHED
from gpumem_tui.watch import watch

from .terminal import until
from .watching import EXAMPLES, Seen, check_exact, run_under_exec, small_model, train

# transformers and PEFT still use names that newer transformers call deprecated.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::FutureWarning:(transformers|peft|accelerate)\..*"),
    pytest.mark.usefixtures("frozen_heap", "runtime_folder"),
]


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


def test_attach_shows_the_loop_and_toggles_become_advice(seen: Seen, tmp_path: Path) -> None:
    model, optimizer = small_model()
    with watch(model, optimizer, name="mine"):
        train(model, optimizer, 2)
        remote = Remote(engine_registry.find("mine").members[0])
        remote.attach()
        until(lambda: remote.run is not None and remote.run.latest is not None and len(remote.run.traces()) == 2)
        config = remote.run.config
        assert remote.role is ViewerRole.WATCHING and config is not None
        assert (config.model, config["checkpointing"], config.batch_size) == ("GPTNeoXForCausalLM", "layers", 2)
        wanted = config.with_({"kv_cache": not config["kv_cache"]})
        with pytest.raises(
            UserError, match=r"is for your script to set: model\.config\.use_cache = (True|False); it acts on"
        ):
            remote.command(Start(wanted))
        for command in (Stop(), Pause(True)):
            with pytest.raises(UserError, match="the loop is your own script's"):
                remote.command(command)
        remote.command(Save(tmp_path / "mine.gpumem"))
        until(lambda: isinstance(remote.events(0)[-1], Saved))
        assert [t.step for t in Recording(tmp_path / "mine.gpumem").run.traces()] == [1, 2]
        train(model, optimizer, 1)
    until(lambda: remote.role is ViewerRole.GONE)
    assert [type(m) for m in remote.events(0)][-2:] == [RunEnded, EngineEnded]
    remote.close()


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


def test_a_python_of_another_environment_is_told_which_one_to_use(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False)
    other = tmp_path / "bin" / "python"
    script = run_under_exec(str(other), "-c", "print('it runs all the same')")
    out, said = script.communicate(timeout=100)
    assert script.returncode == 0 and "it runs all the same" in out
    (line,) = said.splitlines()
    assert line.startswith(f"gpumem-tui: not installed for {other}, which is not watched: activate the environment")
    assert line.endswith(f"give that python: {sys.executable}")


def test_a_script_that_watches_itself_is_watched_once_under_exec() -> None:
    watched = run_under_exec(sys.executable, "-c", (
        "import torch; from gpumem_tui.watch import watch\n"
        "model = torch.nn.Linear(8, 8); optimizer = torch.optim.SGD(model.parameters())\n"
        "with watch(model, optimizer, name='mine'):\n"
        "    for _ in range(3): model(torch.ones(2, 8)).sum().backward(); optimizer.step(); optimizer.zero_grad()\n"
    ))  # fmt: skip
    out, err = watched.communicate(timeout=100)
    assert (watched.returncode, out) == (0, "")
    assert err == "gpumem-tui: watching Linear; to see it: gpumem-tui attach mine\n"


def test_a_script_under_exec_ends_as_it_would_without() -> None:
    script = run_under_exec(sys.executable, str(EXAMPLES / "unedited.py"), "3")
    out, err = script.communicate(timeout=100)
    assert (script.returncode, out) == (0, "trained 3\n")
    assert err == "gpumem-tui: watching Net; to see it: gpumem-tui attach unedited\n"
    other = run_under_exec(sys.executable, "-c", "import sys; sys.exit('no training here')")
    assert other.communicate() == ("", f"no training here\n{NOTHING_WATCHED}") and other.returncode == 1


def test_nothing_watched_is_said_by_the_command_alone_and_not_where_a_worker_was() -> None:
    worker = (
        "import torch; model = torch.nn.Linear(4, 4); optimizer = torch.optim.SGD(model.parameters());"
        "model(torch.ones(1, 4)).sum().backward(); optimizer.step()"
    )
    command = "import os, subprocess, sys; os.fork() or sys.exit(); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    for code, said in (("print('helps')", True), (worker, False)):
        out, err = run_under_exec(sys.executable, "-c", command, code).communicate(timeout=100)
        assert (out, err.count(NOTHING_WATCHED)) == ("" if not said else "helps\n", said)
