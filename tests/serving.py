"""An engine with a finished run, served by a thread of the tests' own process, and bare connections to its socket."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import msgspec

from gpumem_tui.engine import wire
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.engine_registry import EngineDir, EngineLock
from gpumem_tui.engine.server import Server

from .conftest import Engine


@contextmanager
def an_engine_served(config: RunConfig) -> Iterator[tuple[EngineDir, Engine]]:
    base = tempfile.mkdtemp(prefix="g-")
    engine = Engine()
    engine.run(config)
    with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": base}):
        engine_lock = EngineLock("tiny", "run", wire.PROTOCOL, "0.1")
    info = engine_lock.engine_dir.info()
    assert info is not None
    server = Server(engine.session, info, engine_lock.engine_dir.socket, Path("/dev/null"), None)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            server.serve(1.0)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield engine_lock.engine_dir, engine
    finally:
        over.set()
        server.wake()
        thread.join()
        server.close()
        engine_lock.release()
        engine.session.close()
        shutil.rmtree(base)


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


def pack(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return struct.pack("!I", len(body)) + body


HELLO = {"type": "hello", "protocol": wire.PROTOCOL, "version": "x"}
