"""Questions that several processes answer at once, and that are learnt from in their order. Loads no torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ..config import RunConfig, UserError
from .outcome import Prediction

Answer = Prediction | UserError

Learn = Callable[[Answer], Sequence[RunConfig]]
"""Takes in an answer, in the order of the questions, and says what else to ask."""

Work = Callable[[Sequence[RunConfig], Learn], Iterator[None]]
"""Has configurations predicted as `several.Several.work` does."""


class QuestionsInOrder:
    """Questions that several answer at once, learnt from in their order.

    However long each answer takes, the same is asked: no later answer counts before an earlier one.

    Args:
        first: To ask.
        learn: Is called by one thread at a time.
    """

    def __init__(self, first: Sequence[RunConfig], learn: Learn) -> None:
        self._learn, self._changed = learn, threading.Condition()
        self._waiting = deque(enumerate(first))
        self._asked, self._learnt = len(first), 0
        self._answers: dict[int, Answer] = {}
        self._error: BaseException | None = None

    @property
    def waiting(self) -> int:
        """Number of questions that nobody has taken."""
        return len(self._waiting)

    def take(self) -> tuple[int, RunConfig] | None:
        """The next question and its number, as soon as there is one; None: there will be no more.

        Raises:
            BaseException: Whatever went wrong on another thread.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._learnt == self._asked or self._error)
            if self._error is not None:
                raise self._error
            return self._waiting.popleft() if self._waiting else None

    def answer(self, number: int, answer: Answer) -> None:
        """Give the answer to a question."""
        with self._changed:
            self._answers[number] = answer
            while self._learnt in self._answers:
                more = self._learn(self._answers.pop(self._learnt))
                self._learnt += 1
                self._waiting.extend(enumerate(more, self._asked))
                self._asked += len(more)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Ask no more: everybody who takes a question gets this error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
