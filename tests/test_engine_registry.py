"""The folders of engines: what a crash left is cleaned, and what is damaged in one is said in a line."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpumem_tui.engine import engine_registry, wire
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.engine_registry import EngineDir, EngineLock
from gpumem_tui.engine.remote import Remote, peek
from gpumem_tui.tui.cli import main

from .serving import HELLO, pack
from .viewing import gone, left_over


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


def test_of_a_script_that_has_not_begun_it_is_not_known_what_it_trains(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpumem_tui.tui.commands.ps.peek", lambda _: wire.Status("mine", "watch", 1, state="starting"))
    with a_folder_of("mine"):
        assert main(["ps"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["mine", "1", "–", "–", "starting,"]


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


def test_a_peer_that_sends_a_byte_at_a_time_has_no_more_time_than_another(home: Path) -> None:
    sent = 0
    with a_folder_of("slow") as slow, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(slow.socket))
        listener.listen()

        def trickle() -> None:
            nonlocal sent
            connection, _ = listener.accept()
            with connection, suppress(BrokenPipeError):
                for byte in struct.pack("!I", wire.LARGEST_ASK) + bytes(wire.LARGEST_ASK):
                    connection.sendall(bytes([byte]))
                    sent += 1
                    threading.Event().wait(0.01)

        thread = threading.Thread(target=trickle)
        thread.start()
        assert peek(slow, timeout_s=0.2) is None
        thread.join()
    assert 0 < sent < wire.LARGEST_ASK


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
