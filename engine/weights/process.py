"""The process behind `Measurement`: a request on standard input, entries on standard output, a line of JSON each."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import msgspec

from ..config import Architecture, UserError, one_line
from .document import entries
from .measurement import Request
from .report import Entry, Failed
from .schemes import registry
from .tensors import ModelWeights

NICENESS = 10
"""It gives way to whatever trains; 0: an equal share."""


def main() -> None:
    """Answer the request; end when nobody is there to be told."""
    os.nice(NICENESS)
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What libraries print is none of the answer.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for entry in answered(request):
        answers.write(msgspec.json.encode(entry) + b"\n")


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin, which would be locked when the interpreter ends
        pass
    os._exit(0)


def answered(request: Request) -> Iterator[Entry]:
    """Entries of what is asked for; the last one says if it could not be done."""
    try:
        schemes = [scheme for scheme in registry().values() if scheme.usual]
        yield from entries(request.model, _weights(request), schemes, request.exact)
    except UserError as error:
        yield Failed(text=str(error))
    except Exception as error:  # whoever waits is told, whatever it is
        yield Failed(text=one_line(error))


def _weights(request: Request) -> ModelWeights:
    if request.architecture is None:
        from .checkpoint import open_checkpoint

        return open_checkpoint(request.model, download=False)
    from .random_weights import random_model

    architecture = Architecture.from_dict(request.architecture)
    return random_model(architecture.fields(), architecture.dtype)
