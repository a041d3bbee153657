"""Surveys in processes of their own: in threads each step waits for the interpreter, which an import holds on to."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from typing import IO

from ..config import UserError
from .survey import Survey, survey
from .tensors import WeightTensor


@contextmanager
def survey_processes(tensors: Sequence[WeightTensor], exact: bool) -> Iterator[Callable[[], Future[Survey]]]:
    """Survey tensors, each process every so many-th of them, until the context is left.

    Yields:
        A function to call once for each tensor, in their order. A process waits
        with what it has surveyed until that has been called for.
    """
    count = os.cpu_count() or 1
    with ExitStack() as undo:
        ends = [_process(undo, tensors[first::count], exact) for first in range(min(count, len(tensors)))]
        turns = cycle(ends)

        def following() -> Future[Survey]:
            reader, answers = next(turns)
            return reader.submit(_received, answers)

        yield following


def _process(undo: ExitStack, tensors: Sequence[WeightTensor], exact: bool) -> tuple[ThreadPoolExecutor, IO[bytes]]:
    """A process that surveys them, and a thread to read what it answers."""
    code = "from gpumem_tui.engine.weights.survey_processes import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for whoever asked, who ends this
    )
    assert process.stdin is not None and process.stdout is not None
    undo.enter_context(process)
    reader = undo.enter_context(ThreadPoolExecutor(1))
    undo.callback(reader.shutdown, wait=False, cancel_futures=True)
    undo.callback(process.kill)
    with suppress(BrokenPipeError), process.stdin as request:  # told as an answer that is missing
        pickle.dump((tensors, exact), request)
    return reader, process.stdout


def _received(answers: IO[bytes]) -> Survey:
    try:
        found: Survey | Exception = pickle.load(answers)
    except (EOFError, pickle.UnpicklingError):  # nothing more, or a part of an answer
        raise UserError("a process that reads the weights was killed: is there memory left?") from None
    if isinstance(found, Exception):
        raise found
    return found


def main() -> None:
    """Answer with the survey of each tensor, or why there is none; end when nobody is there to be told."""
    tensors, exact = pickle.load(sys.stdin.buffer)
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as answers:
        for tensor in tensors:
            pickle.dump(_answer(tensor, exact), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _answer(tensor: WeightTensor, exact: bool) -> Survey | Exception:
    try:
        return survey(tensor, exact)
    except Exception as error:  # whoever asked raises it
        return error
