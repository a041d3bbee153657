"""Predictions in the background, in a process of their own: they take no time from training.

    predictor = Predictor(gpu("H100 80GB"))
    predictor.want([config, another])     replaces what was wanted before
    predictor.get(config)                 None until it is known

Loads no torch: the process does. It is started with the first wish that no
process of this user has had before (`prediction_store`), and asked for one
prediction at a time, so what is no longer wanted is never begun.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence

from ..config import RunConfig, UserError
from ..techniques import memory_key
from .forked_process import ForkedProcess
from .gpus import Gpu
from .outcome import Prediction
from .prediction_store import PredictionStore
from .questions import ANSWERS, Question, answer_all, environment, framed, read, serve
from .warm_server import WarmProcess, warm_process

NICENESS = 10
"""For a process for whose answers nobody waits: it gives way, and still gets a tenth of a core where all are busy."""

Answer = Prediction | UserError


class Predictor:
    """A process that predicts on request.

    Args:
        gpu: For which GPU.
        niceness: See `NICENESS`; 0: somebody waits, and it takes an equal share.
    """

    def __init__(self, gpu: Gpu, niceness: int = 0) -> None:
        self._gpu, self._store = gpu, PredictionStore(gpu)
        self._known: dict[str, Answer] = {}
        self._looked_up: set[str] = set()
        self._wanted: list[RunConfig] = []
        self._changed = threading.Condition()
        self._closed = False
        self._process = PredictingProcess(niceness)
        self._thread: threading.Thread | None = None

    def want(self, configs: Sequence[RunConfig]) -> None:
        """Ask for predictions, in this order; what was asked before and is not among them is dropped."""
        with self._changed:
            self._wanted = [config for config in configs if self.get(config) is None]
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._ask_forever, name="predictor", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def get(self, config: RunConfig) -> Answer | None:
        """The prediction, or why there can be none; None while it is not known."""
        if config.unknown_architecture:
            return UserError(config.unknown_architecture)
        return self._known.get(memory_key(config))

    def answers(self) -> int:
        """Number of configurations that are known."""
        return len(self._known)

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything wanted is known; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._wanted or self._closed, timeout_s)

    def close(self) -> None:
        """End the process."""
        with self._changed:
            self._closed = True
            self._wanted = []
            self._changed.notify_all()
        self._process.kill()
        if self._thread is not None:
            self._thread.join()
        self._process.close()

    # --- the thread -----------------------------------------------------------

    def _ask_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                wanted = self._wanted
            self._look_up(wanted)
            if memory_key(wanted[0]) not in self._known:
                self._learn(wanted[0], self._ask(wanted[0]))

    def _look_up(self, wanted: Sequence[RunConfig]) -> None:
        """Learn what others have worked out: of every wish when it is new, and of the next one as it is now."""
        for nth, config in enumerate(wanted):
            key = memory_key(config)
            if key in self._known or (nth and key in self._looked_up):
                continue
            self._looked_up.add(key)
            found = self._store.get(config)
            if found is not None:
                self._learn(config, found)

    def _learn(self, config: RunConfig, answer: Answer) -> None:
        with self._changed:
            self._known[memory_key(config)] = answer
            self._wanted = [other for other in self._wanted if memory_key(other) not in self._known]
            self._changed.notify_all()

    def _ask(self, config: RunConfig) -> Answer:
        return self._process.predict(config, self._gpu)


class PredictingProcess:
    """A process that predicts, started with the first question; used by one thread at a time.

    Where `gpumem-tui warm` has left a server, it is a copy of that one.

    What it finds out is kept for every other process of this user.

    Args:
        niceness: See `NICENESS`; 0: it takes an equal share.
        longest_s: It ends by itself after so many seconds; 0: when it is told to. An interpreter that ends can
            start no thread to see to that.
        forked: It is a copy of this process (`forked_process.can_fork`).
        there: It is there already.

    Attributes:
        ended: It has, before all was answered, and no other is started.
    """

    def __init__(
        self,
        niceness: int = 0,
        longest_s: int = 0,
        forked: bool = False,
        there: WarmProcess | None = None,
    ) -> None:
        self._niceness = niceness
        self._longest_s, self.ended, self._forked = longest_s, False, forked
        self._process: subprocess.Popen[bytes] | ForkedProcess | WarmProcess | None = there
        self._closed = False
        self._warm = longest_s == 0

    def predict(self, config: RunConfig, gpu: Gpu, rank: int | None = None) -> Answer:
        """A prediction, or why there can be none; `rank` as of `predict.predict`."""
        if self._closed:
            return UserError("nothing is predicted any more")
        process = self._started()
        if self._closed:  # `kill` may have looked for it before it was there
            process.kill()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(framed(Question(config.as_dict(), gpu, rank)))
            process.stdin.flush()
            answer = read(process.stdout, ANSWERS)
        except OSError:
            answer = None
        if answer is None:
            _bury(process)
            self._process = None  # the next wish starts another one, unless its time is over
            if isinstance(process, WarmProcess) and not self._closed:
                self._warm = False  # its server has been stopped
                return self.predict(config, gpu, rank)
            self.ended = self._closed = self._closed or self._longest_s > 0
            return UserError("the process that predicts has ended")
        if answer.error:
            return UserError(answer.error)
        PredictionStore(gpu).put(config, answer.prediction, rank)
        return Prediction.unpacked(answer.prediction, config)

    def known_or_predicted(self, config: RunConfig, gpu: Gpu) -> Prediction:
        """A prediction, read if any process of this user has made it before.

        Raises:
            UserError: There can be none.
        """
        answer = PredictionStore(gpu).get(config) or self.predict(config, gpu)
        if isinstance(answer, UserError):
            raise answer
        return answer

    def kill(self) -> None:
        """End it, from any thread: who waits for an answer gets an error."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End it and leave nothing of it, from the thread that asks, or once that has ended."""
        self.kill()
        if self._process is not None:
            _bury(self._process)

    def start(self) -> None:
        """Start it before there is a question: a copy can be made only while there is one thread."""
        self._started()

    def _started(self) -> subprocess.Popen[bytes] | ForkedProcess | WarmProcess:
        if self._process is None:
            # In place of a copy that has ended comes a process from scratch: by now there are threads.
            if self._forked:
                self._process, self._forked = ForkedProcess(answer_all), False
                return self._process
            self._process = warm_process(self._niceness) if self._warm else None
        if self._process is None:
            code = f"from {serve.__module__} import serve; serve({self._niceness}, {self._longest_s})"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # where Linux schedules sessions as groups, niceness counts within one only
                env=environment(),
            )
        return self._process


def _bury(process: subprocess.Popen[bytes] | ForkedProcess | WarmProcess) -> None:
    """Wait for a process that has ended and close its pipes."""
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # an unsent question
                pipe.close()
