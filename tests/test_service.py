"""The engine outlives the terminal: one process serves, others look, command, leave and come back."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from gpumem_tui.engine import engine_registry, wire
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.engine_registry import EngineLock
from gpumem_tui.engine.feed import End, Pause, Save, Start, Stop, TakeOver, ViewerRole
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.remote import peek
from gpumem_tui.engine.run_events import (
    EngineEnded,
    Output,
    Paused,
    Refused,
    RunEnded,
    RunFailed,
    RunStarted,
    Saved,
    StepEnded,
)
from gpumem_tui.engine.service import BROKEN_DEVICE, LINGER_S, Linger, Log
from gpumem_tui.engine.service import _Engine as Served

from .conftest import Engine, small_run
from .terminal import Terminal, until
from .viewing import SMALL, Viewers, cli, gone, kinds, left_over, step_of, steps

# --- the whole story --------------------------------------------------------------


def test_a_dropped_connection_costs_nothing(home: Path) -> None:
    """Start, lose the terminal, come back with all that happened, take over, toggle, detach, stop."""
    environment = {"XDG_RUNTIME_DIR": str(home / "run"), "TMPDIR": str(home / "tmp")}
    first = Terminal(*SMALL, environment=environment, folder=home)
    (engine_dir,) = until(engine_registry.engines)
    until(lambda: step_of(engine_dir) >= 2, lambda: first.output[-2000:])
    info = engine_dir.info()
    assert info is not None and engine_dir.name == "tiny"

    first.hang_up()
    first.close()
    seen = step_of(engine_dir)
    until(lambda: step_of(engine_dir) > seen + 1)

    second = Terminal("attach", environment=environment, folder=home)
    second.sees("tiny")
    second.press("s")
    (saved,) = until(lambda: list(home.glob("*.gpumem")))
    history = Recording(saved)
    told = history.run.events()
    assert [m.step for m in told if isinstance(m, StepEnded)][:seen] == [*range(1, seen + 1)]
    assert [trace.step for trace in history.run.traces()][:2] == [0, 1]

    third = Terminal("attach", "tiny", environment=environment, folder=home)
    third.sees("read-only")
    third.press("l")
    third.sees("takes over")
    third.press("!", "l")
    until(lambda: "lora" in getattr(peek(engine_dir), "techniques", ""), lambda: third.output[-2000:])
    listed = cli("ps").stdout.splitlines()
    assert re.match(r"tiny +\d+ +tiny +B2×S\d+ .*lora .* cpu +\w+ +\d+ +\d+\.\d .* 2$", listed[1])

    second.process.send_signal(signal.SIGSTOP)
    seen = step_of(engine_dir)
    until(lambda: step_of(engine_dir) > seen)
    second.process.send_signal(signal.SIGCONT)

    for terminal in (second, third):
        terminal.press("q", "d") if terminal is third else terminal.press("q")
        assert terminal.wait() == 0
        assert terminal.sane()
        terminal.close()
    until(lambda: getattr(peek(engine_dir), "viewers", 1) == 0)

    assert cli("stop", "tiny").stdout == "tiny has ended\n"
    until(lambda: gone(info.pid))  # the lock goes a moment before the process does
    assert left_over(home) == []


def test_quitting_with_stop_leaves_nothing_behind(home: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(home / "run"), "TMPDIR": str(home / "tmp")}
    terminal = Terminal(*SMALL, environment=environment, folder=home)
    (engine_dir,) = until(engine_registry.engines)
    info = engine_dir.info()
    until(lambda: step_of(engine_dir) >= 1)
    terminal.press("q")
    terminal.sees("the run goes on")
    terminal.press("x")
    assert terminal.wait() == 0
    assert terminal.sane()
    assert info is not None and gone(info.pid)
    assert left_over(home) == []
    terminal.close()


# --- several viewers ----------------------------------------------------------------


def test_the_first_commands_and_the_others_look_until_one_takes_over(
    viewers: Viewers, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when all have left, an engine told not to linger leaves too."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "TRUE")  # has a native library print to descriptor 2
    first = viewers.start(small_run(steps=0), linger_s=0.0)
    until(lambda: steps(first))
    until(lambda: any("OMP_NUM_THREADS" in m.text for m in first.events(0) if isinstance(m, Output)))
    second, third = viewers.attach(first.engine_dir), viewers.attach(first.engine_dir, take=True)
    until(lambda: first.role is ViewerRole.READ_ONLY)
    until(lambda: third.role is ViewerRole.ATTACHED)
    until(lambda: second.role is ViewerRole.READ_ONLY)
    for reader in (first, second):
        with pytest.raises(UserError, match="another viewer commands this engine; ! takes over"):
            reader.command(Stop())
    second.command(TakeOver())
    second.command(Pause(True))
    until(lambda: Paused in kinds(first))
    second.command(Start(small_run(steps=0, lora="on")))
    until(lambda: all(v.run is not None and v.run.config == small_run(steps=0, lora="on") for v in viewers.all))
    assert {v.role for v in (first, third)} == {ViewerRole.READ_ONLY}

    runs = kinds(second).count(RunStarted)
    second.command(Start(small_run().with_({"quantization": "nf4"})))
    until(lambda: Refused in kinds(second))
    assert "set lora=on" in second.events(0)[-1].text
    assert Refused not in kinds(first), "it is said to the one who asked"
    assert kinds(second).count(RunStarted) == runs

    info = first.engine_dir.info() if first.engine_dir else None
    attached = [*viewers.all]
    viewers.attach(first.engine_dir, only_look=True).wait_up_to_date()  # an engine does not go on for this one
    for viewer in attached:
        viewer.close()
    assert info is not None
    until(lambda: gone(info.pid))
    assert left_over(home) == []


@pytest.mark.parametrize("by", ["the viewer that commanded it", "gpumem-tui stop or another SIGTERM"])
def test_whoever_looks_on_is_told_that_the_engine_was_ended_and_by_whom(viewers: Viewers, by: str) -> None:
    first = viewers.start(small_run(steps=0))
    second = viewers.attach(first.engine_dir)
    until(lambda: steps(first) and second.role is ViewerRole.READ_ONLY)
    info = first.engine_dir.info() if first.engine_dir else None
    assert info is not None
    if "viewer" in by:
        first.command(End())
    else:
        os.kill(info.pid, signal.SIGTERM)
    assert second.wait_ended(30)
    *_, ended, told = second.events(0)
    assert (type(ended), type(told)) == (RunEnded, EngineEnded)
    assert told.text == f"the engine was ended by {by}; s saves what was seen, q quits"
    assert told.by == by


# --- death ------------------------------------------------------------------------------


def test_when_the_engine_is_killed_nothing_seen_is_lost_and_it_can_be_started_again(
    viewers: Viewers, home: Path
) -> None:
    viewer = viewers.start(small_run(steps=0))
    until(lambda: steps(viewer) >= 2 and len(viewer.run.traces()) >= 3)
    status = peek(viewer.engine_dir) if viewer.engine_dir else None
    assert status is not None
    os.kill(status.pid, signal.SIGKILL)
    until(lambda: viewer.role is ViewerRole.GONE)
    told = viewer.events(0)[-1]
    assert told.text == (
        f"the engine's process {status.pid} has ended (killed by SIGKILL); "
        "s saves what was seen, r starts the run again, q quits"
    )
    until(lambda: gone(status.pid))  # the lock goes a moment before the process does
    viewer.command(Save(home / "seen.gpumem"))
    until(lambda: Saved in kinds(viewer))
    assert len(Recording(home / "seen.gpumem").run.traces()) == len(viewer.run.traces()) >= 3
    with pytest.raises(UserError, match="the engine has gone"):
        viewer.command(Stop())

    config = viewer.run.config
    assert config is not None
    viewer.command(Start(config))
    until(lambda: viewer.role is ViewerRole.ATTACHED and kinds(viewer)[-1] is StepEnded)
    told_all = viewer.events(0)
    assert [m.index for m in told_all] == list(range(len(told_all)))
    assert [m.run for m in told_all if isinstance(m, RunStarted)] == [1, 2]
    viewer.command(End())
    assert viewer.wait_ended(30)
    assert left_over(home) == []


# --- how long it stays ----------------------------------------------------------------


def test_a_run_without_viewers_ends_when_its_steps_are_done_and_ten_minutes_more() -> None:
    linger = Linger(None)
    assert not linger.over(0.0, idle=False, now_s=10 * LINGER_S)
    assert not linger.over(0.0, idle=True, now_s=10 * LINGER_S + 1)
    assert not linger.over(0.0, idle=True, now_s=11 * LINGER_S)
    assert linger.over(0.0, idle=True, now_s=11 * LINGER_S + 2)
    assert not linger.over(None, idle=True, now_s=20 * LINGER_S), "somebody looks at it"
    assert not linger.over(20 * LINGER_S, idle=True, now_s=20 * LINGER_S + 1)


def test_linger_counts_from_when_the_last_viewer_left() -> None:
    linger = Linger(5.0)
    assert not linger.over(None, idle=False, now_s=100.0)
    assert not linger.over(100.0, idle=False, now_s=104.0)
    assert linger.over(100.0, idle=False, now_s=105.0)


# --- what libraries print -----------------------------------------------------------------


def test_an_engine_that_has_lost_its_device_ends_and_says_so(home: Path, engine: Engine) -> None:
    """After a CUDA error every call fails: only another process can go on."""
    engine_lock = EngineLock("tiny", "run", wire.PROTOCOL, "0")
    info = engine_lock.engine_dir.info()
    assert info is not None
    served = Served(engine.session, info, engine_lock, Log(engine_lock.engine_dir.log), Linger(None))
    engine.session.tell(RunFailed(text="CUDA error: device-side assert triggered"))
    assert served.serve() == BROKEN_DEVICE
    assert left_over(home) == []


def test_what_is_printed_comes_line_by_line_and_a_progress_bar_as_its_last_state(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")

    def write(text: str) -> None:
        with (tmp_path / "log").open("a") as file:
            file.write(text)

    write("CUDA says hello\nhalf ")
    assert log.new_lines() == ["CUDA says hello"]
    write("a line\n 10%\r 50%\r100%\n\n")
    assert log.new_lines() == ["half a line", "100%"]
    write("".join(f"line {i}\n" for i in range(500)))
    lines = log.new_lines()
    assert (len(lines), lines[0], lines[-1]) == (51, "... 450 lines more in the log ...", "line 499")


def test_commands_on_engines_that_are_not_there_say_so(home: Path) -> None:
    assert cli("ps").stdout == "no engine is running\n"
    for words, said in (
        (("attach", "tiny"), "no engine called tiny is running; gpumem-tui starts one"),
        (("stop", "warm"), "no engine called warm is running"),
        (("stop",), "no engine is running"),
    ):
        done = cli(*words)
        assert (done.returncode, done.stderr) == (2, f"gpumem-tui: {said}\n")
    done = cli("--linger", "soon")
    assert (done.returncode, done.stderr) == (2, "gpumem-tui: --linger soon: takes a time such as 90, 10m or 2h\n")
