"""The runs of a source as OpenMetrics while they go on: in a file that is replaced, or over HTTP on loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .atomic_file import replacing
from .config import UserError, one_line
from .events import StepTrace
from .exports.openmetrics import CONTENT_TYPE, Reading, exposition
from .feed import Source
from .ledger import Ledger
from .run import Run, highest_of
from .run_events import StepEnded

EVERY_S = 1.0
"""Between two writings of a file; whoever reads it does so less often."""
LAST_PORT = 65535
HOSTS = ("127.0.0.1", "localhost")


@contextmanager
def published(source: Source, target: str, name: str) -> Iterator[None]:
    """Publish a source's latest run for as long as the block lasts, and once more at its end.

    Args:
        source: Whose.
        target: A file's name, or a port of this machine.
        name: The label `run`.

    Raises:
        UserError: The file cannot be written, or the port cannot be had.
    """
    text = LatestRun(source, name).text
    with _over_http(_port(target), text) if target.isdecimal() else _in_file(Path(target), text):
        yield


class LatestRun:
    """The text of a source's latest run; a trace is folded once, whoever asks how often.

    Args:
        source: Whose.
        name: The label `run`.
    """

    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name
        self._lock = threading.Lock()
        self._folded: list[Ledger] = []

    def text(self) -> bytes:
        """The metrics at this moment; no samples before the first run."""
        runs = self._source.runs()
        with self._lock:
            return exposition([self._reading(runs[-1])] if runs else [])

    def _reading(self, run: Run) -> Reading:
        labels = {"run": self._name, "rank": str(run.id.rank), "device": run.environment.device}
        steps = [event.step for event in run.events() if isinstance(event, StepEnded)]
        traces = [trace for trace in run.traces() if trace.is_complete]
        last = self._fold(traces[-1]) if traces else None
        highest_trace = highest_of(traces)
        highest = self._fold(highest_trace) if highest_trace is not None else None
        self._folded = [ledger for ledger in (last, highest) if ledger is not None]
        return Reading(
            labels, max(steps, default=0), last.end if last else None, highest.peak.by_category if highest else None,
            run.gauge,
        )  # fmt: skip

    def _fold(self, trace: StepTrace) -> Ledger:
        return next((ledger for ledger in self._folded if ledger.trace is trace), None) or Ledger(trace)


@contextmanager
def _in_file(path: Path, text: Callable[[], bytes]) -> Iterator[None]:
    """Write a file for node_exporter's textfile collector: replaced whole, never half there."""
    _replace(path, text())
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(EVERY_S):
            try:
                _replace(path, text())
            except UserError:  # a disk that is full now; the end tells if it still is
                continue

    writer = threading.Thread(target=go_on, name="metrics", daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()
    _replace(path, text())


def _replace(path: Path, text: bytes) -> None:
    try:
        with replacing(path) as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--metrics {path}: not written: {error.strerror or one_line(error)}") from None


def _port(target: str) -> int:
    """A port that a scraper can be told of: 0 would be another one every time."""
    if not (len(target) <= 5 and 0 < int(target) <= LAST_PORT):
        raise UserError(f"--metrics {target:.20}: a port is a number from 1 to {LAST_PORT}")
    return int(target)


@contextmanager
def _over_http(port: int, text: Callable[[], bytes]) -> Iterator[None]:
    """`GET /metrics` on loopback only; a page of another origin that has this machine's name gets nothing."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in HOSTS:
                self.send_error(403)
            elif self.path.split("?", 1)[0] != "/metrics":
                self.send_error(404)
            else:
                body = text()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """The terminal is not ours to write to."""

    try:
        server = ThreadingHTTPServer((HOSTS[0], port), Handler)
    except OSError as error:
        raise UserError(f"--metrics {port}: cannot be had: {one_line(error)}") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
