"""An engine's socket: nobody else reaches it, and what arrives ends its own connection at most."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpumem_tui.engine import wire
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.engine_registry import EngineDir
from gpumem_tui.engine.events import StepTrace
from gpumem_tui.engine.feed import Save, ViewerRole
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.remote import Remote, peek
from gpumem_tui.engine.run_events import RunStarted, Saved, StepEnded
from gpumem_tui.engine.server import VIEWERS_MAX

from .conftest import Engine, small_run
from .serving import HELLO, an_engine_served, ends, pack, raw
from .terminal import until
from .viewing import Viewers, kinds

READ_ANSWER = wire.read_answer


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


def test_nobody_else_can_reach_the_socket(served: EngineDir) -> None:
    assert served.folder.stat().st_mode & 0o777 == 0o700
    assert served.folder.parent.stat().st_mode & 0o777 == 0o700
    assert served.socket.stat().st_mode & 0o777 == 0o600


def test_another_user_is_shown_the_door(served: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "peer_uid", lambda _connection: os.getuid() + 1)
    with raw(served) as connection:
        assert ends(connection)


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
    first.members[0]._commands.append(
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


def test_who_only_looks_is_told_everything_and_is_no_viewer(served: EngineDir, viewers: Viewers) -> None:
    """Nobody finds the command taken because something has read the engine just then."""
    before = peek(served)
    looking = viewers.attach(served, only_look=True)
    looking.wait_up_to_date()
    assert looking.role is ViewerRole.READ_ONLY and looking.run is not None and len(looking.run.traces()) == 4
    assert before is not None and (status := peek(served)) is not None and status.viewers == before.viewers
    late = viewers.attach(served)
    late.wait_up_to_date()
    assert late.role is ViewerRole.ATTACHED
    with raw(served) as connection:
        connection.sendall(pack(HELLO | {"type": "look"}) + pack({"type": "do", "name": "take over"}))
        assert isinstance(wire.read_answer(connection), wire.Welcome)
        assert ends(connection)
    assert late.role is ViewerRole.ATTACHED


def test_who_only_looks_at_an_engine_that_dies_is_told_so(served: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Remote(served, only_look=True)
    monkeypatch.setattr(wire, "read_answer", _cut_after_the_welcome)
    looking.attach()
    with pytest.raises(UserError, match=r"tiny: the engine's process [0-9]+ has ended"):
        looking.wait_up_to_date()
    looking.close()


def _cut_after_the_welcome(connection: socket.socket, *limits: float) -> wire.Answer:
    if not limits:  # of an answer, which may be long
        raise EOFError
    return READ_ANSWER(connection, *limits)  # type: ignore[arg-type]


def test_who_commands_never_reads_read_only(served: EngineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the engine has said who commands nothing is said of it."""
    viewer = Remote(served)
    monkeypatch.setattr(viewer, "_main", lambda: None)  # its answer is on the way
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


def test_no_port_is_opened() -> None:
    before = psutil.Process().net_connections(kind="inet")  # of other tests' process groups
    with an_engine_served(small_run(steps=1)) as (engine_dir, _):
        viewer = Remote(engine_dir)
        viewer.attach()
        assert psutil.Process().net_connections(kind="inet") == before
        viewer.close()
