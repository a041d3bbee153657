"""Predictions by this process and, where there are cores, by others beside it. Loads no torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..config import RunConfig, UserError
from ..engine_registry import warm_servers
from .forked_process import can_fork
from .gpus import Gpu
from .outcome import Prediction
from .predictor import Answer, PredictingProcess
from .questions_in_order import Learn, QuestionsInOrder

MOST_PROCESSES = 4
"""Each that is no copy loads the libraries for itself, and half a gigabyte with them."""

WORTH_S = 20.0
"""Work that others are started for, which takes each of them some seconds; a copy of this process takes none."""


class Several:
    """Predicts several configurations at once.

    Args:
        gpu: For which GPU.
        predict: Predicts one in this process.
        processes: This one included; None: one for each core.
    """

    def __init__(self, gpu: Gpu, predict: Callable[[RunConfig], Prediction], processes: int | None = None) -> None:
        cores = min(MOST_PROCESSES, len(os.sched_getaffinity(0))) if processes is None else processes
        self._gpu, self._predict, self._others = gpu, predict, cores - 1
        self._processes: list[PredictingProcess] = []
        self._longest_s = 0.0

    def work(self, first: Sequence[RunConfig], learn: Learn) -> Iterator[None]:
        """Have configurations predicted, those first, and whatever `learn` wants beside them.

        Args:
            first: To predict.
            learn: See `Learn`; an error is of a configuration that cannot run.

        Yields:
            Whenever this process has predicted one itself.
        """
        questions = QuestionsInOrder(first, learn)
        threads: list[threading.Thread] = []
        try:
            while (question := questions.take()) is not None:
                if not threads and questions.waiting and self._is_worth_it(1 + questions.waiting):
                    self._start()
                    threads = [
                        threading.Thread(target=_work, args=(questions, self._there(process)), daemon=True)
                        for process in self._processes
                    ]
                    for thread in threads:
                        thread.start()
                number, config = question
                questions.answer(number, self._here(config))
                yield
        except BaseException as error:
            questions.fail(error)
            for process in self._processes:
                process.kill()  # nobody waits for the answers that are under way
            raise
        finally:
            for thread in threads:
                thread.join()

    def another(self) -> Callable[[RunConfig], Prediction] | None:
        """Predictions by another process, on another thread than this; None if it would take longer than it saves."""
        if _at_once():
            self._start()
        if not self._processes:
            return None
        process = self._processes[0]
        return lambda config: process.known_or_predicted(config, self._gpu)

    def _is_worth_it(self, questions: int) -> bool:
        return _at_once() or self._longest_s * questions > WORTH_S

    def _start(self) -> None:
        if not self._processes:
            forked = can_fork()
            self._processes = [PredictingProcess(forked=forked) for _ in range(self._others)]
            for process in self._processes:
                process.start()

    def close(self) -> None:
        """End the other processes."""
        for process in self._processes:
            process.close()

    def _here(self, config: RunConfig) -> Answer:
        try:
            found = self._predict(config)
        except UserError as error:
            return error
        self._longest_s = max(self._longest_s, found.seconds)
        return found

    def _there(self, process: PredictingProcess) -> Callable[[RunConfig], Answer]:
        def ask(config: RunConfig) -> Answer:
            try:
                return process.known_or_predicted(config, self._gpu)
            except UserError as error:
                return error

        return ask


def _at_once() -> bool:
    """True if another process begins without loading anything."""
    return can_fork() or ("torch" not in sys.modules and bool(warm_servers()))


@contextmanager
def several(gpu: Gpu, predict: Callable[[RunConfig], Prediction]) -> Iterator[Several]:
    """See `Several`; the others end with the block."""
    made = Several(gpu, predict)
    try:
        yield made
    finally:
        made.close()


def _work(questions: QuestionsInOrder, ask: Callable[[RunConfig], Answer]) -> None:
    """Answer what waits until there is no more."""
    try:
        while (question := questions.take()) is not None:
            number, config = question
            questions.answer(number, ask(config))
    except BaseException as error:
        questions.fail(error)
