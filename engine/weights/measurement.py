"""A model measured in a process of its own, which gives way to whatever trains. Loads no torch: the process does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import msgspec

from ..config import Architecture, RunConfig
from .report import Entry, Failed, ModelEnd, ModelHead, TensorReport

ENDED = "The process that measures has ended."


class Request(msgspec.Struct, frozen=True):
    """A request to the process.

    Attributes:
        model: Name, folder or hub id.
        architecture: To draw random weights by, as `Architecture.as_dict`; None: those of `model` are read.
        exact: Whether every weight is to be measured.
    """

    model: str
    architecture: dict[str, object] | None
    exact: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that are measured: equal for all configurations of one model.

    Attributes:
        model: Name, folder or hub id.
        architecture: Of random weights; None: they are read.
    """

    model: str
    architecture: Architecture | None


def weights_of(config: RunConfig) -> Weights | None:
    """The weights that a run has; None: nobody knows them (a script's own model)."""
    if not config.pretrained and config.architecture is None:
        return None
    return Weights(config.model, config.architecture)


@dataclass
class Measurement:
    """One model, from the first tensor to the last; what is known grows while it is looked at.

    Attributes:
        weights: Whose.
        exact: Whether every weight is measured, and not a sample.
        head: What there is to come; None: the libraries are being loaded.
        reports: Of the tensors so far.
        end: Which of them a run would quantize; None: not all have been measured.
        failure: Why it could not be done; empty: nothing went wrong.
    """

    weights: Weights
    exact: bool = False
    head: ModelHead | None = None
    reports: list[TensorReport] = field(default_factory=list)
    end: ModelEnd | None = None
    failure: str = ""
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin."""
        code = "from gpumem_tui.engine.weights.process import main; main()"
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        threading.Thread(target=self._read, args=(process,), name="weights", daemon=True).start()

    @property
    def running(self) -> bool:
        """True if there is more to come."""
        return self.end is None and not self.failure

    def stop(self) -> None:
        """Leave it; what is known stays."""
        if self._process is not None:
            self._process.kill()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        plain = None if self.weights.architecture is None else self.weights.architecture.as_dict()
        request = Request(self.weights.model, plain, self.exact)
        try:
            process.stdin.write(msgspec.json.encode(request) + b"\n")
            process.stdin.flush()  # and is left open: when it closes, nobody is there to be told any more
            for line in process.stdout:
                self._take(msgspec.json.decode(line, type=Entry))
        except (OSError, msgspec.DecodeError):
            pass  # it was killed in the middle of a line
        process.wait()
        with contextlib.suppress(OSError):  # closing writes what the process was killed too early to take
            process.stdin.close()
        process.stdout.close()
        if self.running:
            self.failure = ENDED

    def _take(self, entry: Entry) -> None:
        match entry:
            case ModelHead():
                self.head = entry
            case ModelEnd():
                self.end = entry
            case Failed():
                self.failure = entry.text
            case _:
                self.reports.append(entry.report)
