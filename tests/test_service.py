"""The engine outlives the terminal: one process serves, others look, command, leave and come back."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from gpumem_tui.engine import engine_registry, wire
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.engine_registry import EngineDir, EngineLock
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.feed import End, Pause, Save, Start, Stop, TakeOver, ViewerRole
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.remote import Remote, peek
from gpumem_tui.engine.run_events import (
    EngineEnded,
    Output,
    Paused,
    Refused,
    RunEnded,
    RunEvent,
    RunFailed,
    RunStarted,
    Saved,
    StepEnded,
)
from gpumem_tui.engine.server import VIEWERS_MAX
from gpumem_tui.engine.service import BROKEN_DEVICE, LINGER_S, Linger, Log
from gpumem_tui.engine.service import _Engine as Served
from gpumem_tui.tui.cli import main

from .conftest import Engine, small_run
from .serving import an_engine_served
from .terminal import Terminal, until

SMALL = ["--device", "cpu", "--batch-size", "2", "--seq-len", "16", "--set", "rows=8"]


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


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpumem_tui.tui", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def left_over(home: Path) -> list[str]:
    """Sockets, folders and temporary files that should not be there any more."""
    ours = {home / "run" / "gpumem-tui", home / "run" / "gpumem-tui" / ".lock"}
    found = {path for folder in ("run", "tmp") for path in (home / folder).rglob("*")}
    # torch makes a cache folder for its compiler, whoever imports it.
    return [str(path) for path in found - ours if not path.name.startswith("torchinductor")]


def step_of(engine_dir: EngineDir) -> int:
    status = peek(engine_dir)
    return status.step if status is not None else 0


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Viewers:
    """Viewers of one engine in this process, detached when the test is over."""

    def __init__(self) -> None:
        self.all: list[Remote] = []

    def start(self, config: RunConfig, linger_s: float | None = None) -> Remote:
        remote = Remote(launch=Launcher(linger_s))
        self.all.append(remote)
        remote.start(config)
        until(lambda: remote.events(0) and remote.role is ViewerRole.ATTACHED, lambda: remote.events(0))
        return remote

    def attach(self, engine_dir: EngineDir | None, take: bool = False) -> Remote:
        assert engine_dir is not None
        remote = Remote(engine_dir, take=take)
        self.all.append(remote)
        remote.attach()
        return remote


@pytest.fixture
def viewers(home: Path) -> Iterator[Viewers]:
    made = Viewers()
    yield made
    for viewer in made.all:
        viewer.close()


def kinds(viewer: Remote) -> list[type[RunEvent]]:
    return [type(m) for m in viewer.events(0)]


def steps(viewer: Remote) -> int:
    return kinds(viewer).count(StepEnded)


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
    assert re.match(r"tiny +\d+ +tiny +batch_size=2 .*lora=on.* cpu +\w+ +\d+ +\d+\.\d .* 2$", listed[1])

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
    for viewer in viewers.all:
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


def test_what_a_crash_left_is_cleaned_at_the_next_start(home: Path) -> None:
    engine_lock = subprocess.run(
        [sys.executable, "-c", "from gpumem_tui.engine.engine_registry import EngineLock; import os, socket; "
         "c = EngineLock('old', 'run', 1, '0'); s = socket.socket(socket.AF_UNIX); s.bind(str(c.engine_dir.socket)); "
         "os.kill(os.getpid(), 9)"], check=False,
    )  # fmt: skip
    assert engine_lock.returncode == -signal.SIGKILL
    assert {Path(path).name for path in left_over(home)} == {"old", "lock", "card.json", "socket"}
    assert engine_registry.engines() == []
    new = EngineLock("old", "run", 1, "0")
    assert new.engine_dir.name == "old" and not new.engine_dir.socket.exists()
    second = EngineLock("old", "run", 1, "0")
    assert [p.name for p in engine_registry.engines()] == ["old", "old-2"]
    for each in (new, second):
        each.release()
    assert left_over(home) == []


# --- the socket -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[EngineDir, Engine]]:
    """An engine with a run that has ended, served by a thread of this process."""
    with an_engine_served(small_run(steps=3, checkpointing="layers")) as made:
        yield made


@pytest.fixture
def served(serving: tuple[EngineDir, Engine]) -> EngineDir:
    return serving[0]


def test_a_viewer_sees_what_the_engine_has_from_the_beginning(
    serving: tuple[EngineDir, Engine], tmp_path: Path
) -> None:
    """The recording of one who came late is the recording of one who was there."""
    engine_dir, engine = serving
    late, there = Remote(engine_dir), engine.session
    late.attach()
    until(lambda: len(late.events(0)) == len(there.events(0)) and late.run is not None and len(late.run.traces()) == 4)
    assert list(late.events(0)) == list(there.events(0))
    assert (late.run.config, late.environment()) == (there.run.config, there.environment())
    for ours, theirs in zip(late.run.traces(), there.run.traces(), strict=True):
        for field in dataclasses.fields(StepTrace):
            mine, original = getattr(ours, field.name), getattr(theirs, field.name)
            assert np.array_equal(mine, original) if isinstance(original, np.ndarray) else mine == original
            assert type(getattr(ours, field.name)) is type(getattr(theirs, field.name))
        assert Ledger(ours).peak == Ledger(theirs).peak
    late.command(Save(tmp_path / "late.gpumem"))
    until(lambda: Saved in kinds(late))
    assert list(Recording(tmp_path / "late.gpumem").run.events()) == list(there.run.events())
    late.close()


def raw(engine_dir: EngineDir) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(engine_dir.socket))
    return connection


def ends(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_nobody_else_can_reach_the_socket(served: EngineDir) -> None:
    assert served.folder.stat().st_mode & 0o777 == 0o700
    assert served.folder.parent.stat().st_mode & 0o777 == 0o700
    assert served.socket.stat().st_mode & 0o777 == 0o600


def test_another_user_is_shown_the_door(served: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "peer_uid", lambda _connection: os.getuid() + 1)
    with raw(served) as connection:
        assert ends(connection)


def pack(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return struct.pack("!I", len(body)) + body


HELLO = {"type": "hello", "protocol": wire.PROTOCOL, "version": "x"}


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\n\r\n", struct.pack("!I", 0xFFFFFFFF), struct.pack("!I", wire.LARGEST_ASK + 1),
        struct.pack("!I", 3) + b"\xc1\xc1\xc1", pack({"type": "nothing"}), pack([1, 2, 3]), pack({"type": "hello"}),
        pack({"type": "ask", "since": 0, "trace": 0, "runs": 0}), pack(HELLO | {"protocol": "one"}),
        pack(HELLO) + pack({"type": "do", "name": "rm"}), pack(HELLO) + pack({"type": "ask", "since": None}),
        struct.pack("!I", 2000) + b"\x91" * 2000, b"\x80\x04\x95" + b"." * 40,
        struct.pack("!I", 8) + b"\x81\xa4type\xa1\xff", pack(HELLO) + struct.pack("!I", 8) + b"\x81\xa4type\xa1\xff",
    ],
    ids=lambda data: repr(data[:24]),
)  # fmt: skip
def test_nonsense_ends_its_connection_and_nothing_else(served: EngineDir, nonsense: bytes) -> None:
    bystander = Remote(served)
    bystander.attach()
    with raw(served) as connection:
        connection.sendall(nonsense)
        greeted = nonsense.startswith(pack(HELLO))
        if greeted:
            assert isinstance(wire.read_answer(connection), wire.Welcome)
        assert ends(connection)
    until(lambda: bystander.run is not None and bystander.run.latest is not None)
    assert bystander.role in (ViewerRole.ATTACHED, ViewerRole.READ_ONLY)
    bystander.close()


WRONG = [
    ({"unknown": 1}, "start: run configuration has unknown keys: unknown"),
    ({"batch_size": -3}, "start: batch_size=-3 is not allowed; batch_size takes a whole number from 1 to 65536"),
    ({"options": {"lora": True, "lora.r": -3}}, "start: lora.r=-3 is not allowed"),
    ({"options": {"zoom": 1}}, "start: there is no setting 'zoom'"),
    ({"options": {"quantization": "nf4"}}, "quantization=nf4 freezes the weights: set lora=on"),
    ({"options": 3}, "start: options is a mapping, not 3"),
    ({"model": 7}, "start: model=7 is not allowed"),
    ({"seq_len": "9" * 100_000}, "start: seq_len=999"),
]


@pytest.mark.parametrize(("config", "why"), WRONG, ids=[why[:40] for _, why in WRONG])
@pytest.mark.parametrize("commands", [True, False], ids=["commanding", "looking on"])
def test_a_configuration_that_cannot_run_is_refused_to_whoever_sent_it(
    serving: tuple[EngineDir, Engine], config: dict[str, object], why: str, commands: bool
) -> None:
    """It starts nothing, and only a viewer that commands learns what is wrong with it."""
    engine_dir, engine = serving
    before = len(engine.session.events(0))
    with raw(engine_dir) as first, raw(engine_dir) as second:
        for connection in (first, second):
            connection.sendall(pack(HELLO | {"take": connection is first}))
            assert isinstance(wire.read_answer(connection), wire.Welcome)
        sender, other = (first, second) if commands else (second, first)
        sender.sendall(pack({"type": "do", "name": "start", "config": config}))
        (told, more), (nothing, _) = news(sender), news(other)
        assert told.startswith(why if commands else "another viewer commands this engine")
        assert len(told) <= 300 and told.isprintable()
        assert (more, nothing) == (commands, "")
    assert len(engine.session.events(0)) == before


def news(connection: socket.socket) -> tuple[str, bool]:
    """Why this viewer's last command did nothing, and whether it commands."""
    connection.sendall(pack({"type": "ask", "since": 1 << 40, "trace": 1 << 40, "runs": 0}))
    answer = wire.read_answer(connection)
    assert isinstance(answer, wire.News)
    return answer.refused, answer.commands


def test_a_start_that_names_little_has_defaults(viewers: Viewers) -> None:
    first = viewers.start(small_run(steps=0))
    first._commands.append(
        wire.Do(
            "start",
            {
                "architecture": small_run().as_dict()["architecture"],
                "seq_len": 16,
                "rows": 8,
                "options": {"lora": "on"},
            },
        )
    )
    until(lambda: kinds(first).count(RunStarted) == 2)
    until(lambda: kinds(first)[-1] is StepEnded)
    assert first.run.config == dataclasses.replace(small_run(steps=0, batch_size=8, lora="on"), trace="auto")


def test_a_fault_in_answering_one_viewer_is_that_viewers_alone(
    serving: tuple[EngineDir, Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine_dir, engine = serving
    with raw(engine_dir) as connection, monkeypatch.context() as broken:
        broken.setattr(engine.session, "gauge", lambda: 1 / 0)
        connection.sendall(pack(HELLO) + pack({"type": "ask", "since": 0, "trace": 0, "runs": 0}))
        assert isinstance(wire.read_answer(connection), wire.Welcome)
        assert ends(connection)
    assert "a viewer could not be answered: division by zero" in caplog.text
    assert peek(engine_dir) is not None


def test_who_commands_never_reads_read_only(served: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the engine has said who commands nothing is said of it."""
    viewer = Remote(served)
    monkeypatch.setattr(viewer, "_follow", lambda config: None)  # its answer is on the way
    assert viewer.role is ViewerRole.ATTACHED
    viewer.attach()
    assert viewer.role is ViewerRole.ATTACHED
    viewer._take_in(wire.News([], None, None, [], None, more=False, commands=False, viewers=2, refused=""))
    assert viewer.role is ViewerRole.READ_ONLY
    assert viewer._connection is not None
    viewer._connection.close()
    viewer.close()


def test_another_version_gets_one_clear_line(served: EngineDir) -> None:
    with raw(served) as connection:
        connection.sendall(pack(HELLO | {"protocol": wire.PROTOCOL + 1, "version": "9.9"}))
        answer = wire.read_answer(connection)
        assert isinstance(answer, wire.Refused)
        assert re.fullmatch(
            r"tiny was started by gpumem-tui \S+, this is 9.9: use that version, or end it: .*", answer.text
        )
        assert ends(connection)


def test_a_viewer_that_stops_reading_gets_the_latest_and_never_a_queue(served: EngineDir) -> None:
    """It asks a thousand times and reads nothing: one answer lies in the socket, and the others go on."""
    slow = raw(served)
    slow.sendall(pack(HELLO))
    assert isinstance(wire.read_answer(slow), wire.Welcome)
    ask = pack({"type": "ask", "since": 0, "trace": 0, "runs": 0})
    slow.setblocking(False)
    sent = 0
    try:
        for _ in range(1000):
            sent += slow.send(ask)
    except BlockingIOError:
        pass
    quick = Remote(served)
    quick.attach()
    until(lambda: quick.run is not None and len(quick.run.traces()) == 4)
    quick.close()
    slow.setblocking(True)
    answer = wire.read_answer(slow)
    assert isinstance(answer, wire.News) and answer.trace is not None
    slow.close()


def test_idle_viewers_keep_nobody_out(served: EngineDir) -> None:
    """Whoever has said nothing for longest makes room, and before those who have said hello those who have not."""
    idle = [raw(served) for _ in range(VIEWERS_MAX)]
    for connection in idle[1:]:
        connection.sendall(pack(HELLO))
        assert isinstance(wire.read_answer(connection), wire.Welcome)
    for gone_first in idle[:2]:
        viewer = Remote(served)
        viewer.attach()
        until(lambda v=viewer: v.run is not None and len(v.run.traces()) == 4)  # type: ignore[misc]
        assert ends(gone_first)
        idle.append(viewer)  # type: ignore[arg-type]
    for each in idle:
        each.close()


def test_waiting_connections_burn_no_core_while_there_are_no_descriptors(served: EngineDir) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            connection.connect(str(served.socket))
            began_s = time.process_time()
            threading.Event().wait(1.0)
            assert time.process_time() - began_s < 0.25
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        connection.sendall(pack(HELLO))
        assert isinstance(wire.read_answer(connection), wire.Welcome)


def test_no_port_is_opened(served: EngineDir) -> None:
    assert psutil.Process().net_connections(kind="inet") == []


# --- what is in a folder ------------------------------------------------------------------


def test_a_fork_that_outlives_its_engine_does_not_keep_it_alive(home: Path) -> None:
    code = """
import os, time
from gpumem_tui.engine.engine_registry import EngineLock
lock = EngineLock("forked", "run", 1, "0")
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
os.read(0, 1)
os._exit(0)
"""
    engine = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert engine.stdin is not None and engine.stdout is not None
    with engine.stdin, engine.stdout:
        child = int(engine.stdout.readline())
        (engine_dir,) = engine_registry.engines()
        engine.stdin.write(b"!")
        engine.stdin.flush()
        assert engine.wait(30) == 0
        assert not gone(child)
        assert not engine_dir.alive()
        os.kill(child, signal.SIGKILL)


DAMAGED = ["", "{", "[" * 5000, "[]", "{}", '{"name": 1}', '{"name": "x", "pid": -1}', "\xff\xfe"]


@contextmanager
def a_folder_of(name: str) -> Iterator[EngineDir]:
    """An engine's folder, held by this process."""
    lock = EngineLock(name, "run", wire.PROTOCOL, "0")
    try:
        yield lock.engine_dir
    finally:
        lock.release()


@pytest.mark.parametrize("card", DAMAGED, ids=lambda card: card[:20])
def test_a_damaged_card_is_one_line(home: Path, card: str, capsys: pytest.CaptureFixture[str]) -> None:
    with a_folder_of("broken") as broken:
        (broken.folder / "card.json").write_bytes(card.encode("latin-1"))
        assert main(["ps"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split() == ["broken", "does", "not", "answer"]
        assert main(["stop", "broken"]) == 2
        assert capsys.readouterr().err == "gpumem-tui: broken does not say what its process is\n"


def test_nobody_is_ended_because_a_card_names_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    with a_folder_of("tiny") as tiny, socket.socket(socket.AF_UNIX) as listener:
        card = tiny.folder / "card.json"
        card.write_bytes(card.read_bytes().replace(str(os.getpid()).encode(), str(bystander.pid).encode()))
        listener.bind(str(tiny.socket))
        listener.listen()
        assert main(["stop", "tiny"]) == 2
    assert f"tiny is not process {bystander.pid}" in capsys.readouterr().err
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.parametrize(
    "says",
    [b"HTTP/1.1 400 Bad Request\r\n", b"", pack([1]), pack({"type": "refused"}), pack({"type": "status"}), pack(HELLO),
     struct.pack("!I", 8) + b"\x81\xa4type\xa1\xff", struct.pack("!I", wire.LARGEST_ASK + 1)],
    ids=lambda says: repr(says[:24]),
)  # fmt: skip
def test_whatever_answers_in_an_engines_place_is_one_line(
    home: Path, says: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with a_folder_of("odd") as odd, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(odd.socket))
        listener.listen()

        def answer() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        viewer = Remote(odd)
        with pytest.raises(UserError, match="odd does not answer: ") as refused:
            viewer.attach()
        viewer.close()
        assert len(str(refused.value)) < 300
        assert main(["ps"]) == 0
        assert "does not answer" in capsys.readouterr().out
        thread.join()


def test_a_folder_is_found_where_it_can_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = home / "tmp" / f"gpumem-tui-{os.getuid()}"
    assert engine_registry.runtime_folder() == home / "run" / "gpumem-tui"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/self")  # nothing can be made there
    assert engine_registry.runtime_folder() == private
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    too_long = home / ("x" * 80)
    too_long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(too_long))
    assert engine_registry.runtime_folder() == private
    monkeypatch.setattr(tempfile, "tempdir", str(too_long))
    assert engine_registry.runtime_folder() == Path("/tmp") / private.name


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder away")
def test_a_folder_of_somebody_else_is_said_to_be_theirs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(home / "run", 54321, -1)  # what sudo -E leaves in the environment
    with pytest.raises(UserError, match=f"^{home}/run belongs to user 54321; set XDG_RUNTIME_DIR"):
        engine_registry.runtime_folder()
    os.chown(home / "run", 0, -1)
    os.chown(engine_registry.runtime_folder(), 65534, -1)
    with pytest.raises(UserError, match=f"^{home}/run/gpumem-tui belongs to nobody; "):
        engine_registry.runtime_folder()
    os.chown(home / "run" / "gpumem-tui", 0, -1)


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
    for command in ("attach", "stop"):
        done = cli(command, "tiny")
        assert (done.returncode, done.stderr) == (2, "gpumem-tui: no engine is running; gpumem-tui starts one\n")
    done = cli("--linger", "soon")
    assert (done.returncode, done.stderr) == (2, "gpumem-tui: --linger soon: takes a time such as 90, 10m or 2h\n")
