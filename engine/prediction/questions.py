"""Questions to a process that predicts, and its answers: what goes over its pipes. Loads no torch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from .. import techniques
from ..config import UserError, kind_and_line
from .gpus import Gpu
from .libraries_loading import libraries_loading
from .outcome import Prediction

Message = TypeVar("Message")

LOOK_EVERY_MS = 1000
"""Not every kernel wakes who waits for nothing but a hang-up."""


def environment() -> dict[str, str]:
    """The environment of a process that predicts.

    It models a GPU; the one that may be here is the training's. Where this
    process is watched without having been edited, that one is not.
    """
    watching = str(Path(__file__).parents[1] / "watch" / "autoload")
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder != watching]
    changed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    return os.environ | changed


class Question(msgspec.Struct):
    """A question to the process.

    Attributes:
        config: As `RunConfig.as_dict` has it.
        gpu: For which GPU.
        rank: Of a job of several; None: one of those that hold most.
    """

    config: dict[str, Any]
    gpu: Gpu
    rank: int | None = None


class Told(msgspec.Struct):
    """The answer.

    Attributes:
        error: Why there is none; empty otherwise.
        prediction: As `Prediction.packed` packs it.
    """

    error: str = ""
    prediction: bytes = b""


_LENGTH = struct.Struct("!I")
_encoder = msgspec.msgpack.Encoder()
QUESTIONS, ANSWERS = msgspec.msgpack.Decoder(Question), msgspec.msgpack.Decoder(Told)


def framed(message: msgspec.Struct) -> bytes:
    """A message as `read` reads it: its length and itself."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def read(pipe: IO[bytes], decoder: msgspec.msgpack.Decoder[Message]) -> Message | None:
    """The next message of a pipe; None at its end."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = pipe.read(length)
    return decoder.decode(body) if len(body) == length else None


def serve(niceness: int, longest_s: int) -> None:
    """The process: one question after the other on standard input, one answer to each on standard output.

    It ends at once with whoever asks, even in the middle of an answer.

    Args:
        niceness: It gives way to others by so much.
        longest_s: The signal that ends it comes after so many seconds; 0: none does.
    """
    signal.alarm(longest_s)
    if niceness:
        give_way(niceness)
    threading.Thread(target=_end_with_asker, args=(sys.stdin.fileno(),), name="asker", daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    answer_all(sys.stdin.buffer, answers)


def _end_with_asker(questions: int) -> None:
    """End this process when nobody has the other end of the pipe any more: the answer would be nobody's."""
    end = select.poll()
    end.register(questions, 0)
    while not end.poll(LOOK_EVERY_MS):
        continue
    os._exit(0)


def answer_all(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer questions until there are no more."""
    with libraries_loading():
        from .predict import predict

    while (question := read(questions, QUESTIONS)) is not None:
        answers.write(framed(answer(question, predict)))
        answers.flush()


def answer(question: Question, predict: Callable[..., Prediction]) -> Told:
    """The answer to a question, whatever becomes of it."""
    try:
        config = techniques.parse_config(question.config, "the request")
        prediction = predict(config, question.gpu, rank=question.rank)
    except UserError as error:
        return Told(error=str(error))
    except Exception as error:  # one configuration that breaks must not end the others
        return Told(error=f"this cannot be predicted: {kind_and_line(error)}")
    return Told(prediction=prediction.packed())


def give_way(niceness: int) -> None:
    """Let others go first, those of other sessions too."""
    os.nice(niceness)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))
