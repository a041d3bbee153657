"""An engine with a finished run, served on a socket by a thread of the tests' own process."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from gpumem_tui.engine import wire
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.server import Server
from gpumem_tui.engine.whereabouts import Claim, Place

from .conftest import Engine


@contextmanager
def an_engine_served(config: RunConfig) -> Iterator[tuple[Place, Engine]]:
    base = tempfile.mkdtemp(prefix="g-")
    engine = Engine()
    engine.run(config)
    with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": base}):
        claim = Claim("tiny", "run", wire.PROTOCOL, "0.1")
    card = claim.place.card()
    assert card is not None
    server = Server(engine.session, card, claim.place.socket, Path("/dev/null"), None)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            server.serve(1.0)

    thread = threading.Thread(target=serve)
    thread.start()
    yield claim.place, engine
    over.set()
    server.wake()
    thread.join()
    server.close()
    claim.release()
    engine.session.close()
    shutil.rmtree(base)
