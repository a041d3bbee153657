"""The `Source` of a watched script, its gauge, and the socket, on threads of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from .. import wire
from ..advice import advice
from ..config import RunConfig, UserError, Value
from ..engine_registry import EngineLock
from ..events import Phase, Recompute, StepTrace
from ..feed import Command, Feed, Published, Save, ViewerRole
from ..model_shell import numel
from ..out_of_memory.kept import keep
from ..publisher import RunPublisher
from ..recording import write
from ..run import RunKind
from ..run_events import Note, Refused, RunEnded
from ..server import Server
from ..service import version
from ..techniques import describe
from ..techniques.loss_scaling import scales
from ..tracing.recorder import Recorder
from ..tracing.tracer import Tracer
from ..train import StepResult
from .describe import admitted, script_name
from .fault_barrier import FaultBarrier, log
from .job_rank import job_rank
from .last_words import LastWords, say
from .leftovers import Blocks, kept_by_libraries, leftovers, libraries_blocks, name_leftovers

LAST_ANSWERS_S = 0.5
"""Time for viewers to ask for the last events."""


_SAID: set[str] = set()
"""The names to attach to that have been said."""


class WatchedSource(Published):
    """A watched script as a `Source`, and its socket.

    Args:
        name: In `gpumem-tui ps`; the script's if None.
        memory_limit_bytes: Of the device, as the script is to see it; 0: it is as it is.

    Attributes:
        barrier: Between all of this and the script.
        micro_batches: By step, as far as they are known.
        publisher: Tells of the run.
    """

    live = True
    role = ViewerRole.WATCHING

    def __init__(self, name: str | None, memory_limit_bytes: int = 0) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        name = name or script_name()
        self._rank = job_rank(name)
        self._name = self._rank.job or name
        self._feed = Feed(self._name, rank=self._rank.rank)
        self.publisher = RunPublisher(self._feed)
        self.micro_batches: dict[int, int] = {}
        self.barrier = FaultBarrier(self.failed)
        self._said_compiled = self._dies_of_it = False
        self._left: tuple[int, Blocks] = (0, frozenset())
        self._recorder: Recorder | None = None
        self._libraries: dict[int, str] = {}
        self._server: Server | None = None
        self._engine_lock: EngineLock | None = None
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- Source -------------------------------------------------------------

    def command(self, command: Command) -> None:
        """Refuse, with advice; only saving is ours to do.

        Raises:
            UserError: The loop is the script's own.
        """
        if not isinstance(command, Save):
            raise UserError(advice(command, self.run))
        write(command.path, [self.run] if self.run is not None else [])

    # --- what the watcher tells -------------------------------------------------

    def open(self, recorder: Recorder, tracer: Tracer, device: torch.device, every_step: bool) -> None:
        """Begin to read the gauge and to serve.

        A socket that cannot be had is said in one line; the watching goes on for what it is worth.
        """
        self._recorder, self._libraries = recorder, kept_by_libraries(device)
        self.publisher.look_around(device)
        self.publisher.limit_memory(self._memory_limit_bytes)
        self.publisher.attach(recorder, tracer, every_step)
        read = self.barrier.guard(self.publisher.read_gauge)
        self._run_thread("gpumem-tui gauge", lambda: self.publisher.gauge_forever(self._closing, read))
        try:
            self._engine_lock = engine_lock = self._lock()
            info = engine_lock.engine_dir.info()
            assert info is not None
            self._server = Server(self, info, engine_lock.engine_dir.socket, Path(os.devnull), None)
        except (OSError, UserError) as error:
            log.warning("gpumem-tui: nobody can attach: %s", error)
            return
        self._run_thread("gpumem-tui service", self._serve)

    def _lock(self) -> EngineLock:
        job, rank, ranks, _ = self._rank
        return EngineLock(f"{job}.{rank}" if job else self._name, "watch", wire.PROTOCOL, version(), job, rank, ranks)

    def say_how_to_attach(self, model: torch.nn.Module) -> None:
        """One line for the user, once for every name that there is to attach to; of a job's ranks one says it."""
        if self._engine_lock is None or not self._rank.is_first_here:
            return
        name = self._rank.job or self._engine_lock.engine_dir.name
        if name in _SAID:
            return
        _SAID.add(name)
        ranks = f" on {self._rank.ranks} ranks" if self._rank.job else ""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error closed, or none at all
            sys.stderr.write(
                f"gpumem-tui: watching {type(model).__name__}{ranks}; to see it: gpumem-tui attach {name}\n"
            )
            sys.stderr.flush()

    def begin_run(self, config: RunConfig, model: torch.nn.Module) -> None:
        """The loop has begun, and this is what could be told of it."""
        config = dataclasses.replace(config, memory_limit_bytes=self._memory_limit_bytes)
        self.publisher.begin(config, RunKind.WATCHED, f"watching {describe(config)}")
        parameters = list(model.parameters())
        self.publisher.loaded(sum(map(numel, parameters)), sum(numel(p) for p in parameters if p.requires_grad), None)

    def learn(self, **found: Value | None) -> None:
        """More is known now of the run's configuration."""
        run = self._feed.run
        if run is not None:
            known = {name: value for name, value in found.items() if value or value is False}
            if not scales(run.config):  # a scaler is there, and is not the setting of ours, which is for float16
                known.pop("loss_scaling", None)
            run.config = run.config.with_(dict(admitted(known)))

    def say_compiled(self, modules: int, only_returned: bool) -> None:
        """Some of the model is compiled: say once what cannot be seen of it.

        Args:
            modules: How many modules are.
            only_returned: Whether allocations inside of them are not seen at all.
        """
        if not modules or self._said_compiled:
            return
        self._said_compiled = True
        unseen = (
            "what they allocate is not seen, only what they return"
            if only_returned
            else ("what they allocate is counted, and not told apart by the modules inside")
        )
        self._feed.tell(Note(text=f"{modules} {'module is' if modules == 1 else 'modules are'} compiled: {unseen}"))

    def publish(self, trace: StepTrace) -> None:
        """A trace, with what the script holds named and its micro-batches counted."""
        count = self.micro_batches.get(trace.step, 1)
        if not trace.is_open:
            self.micro_batches = {step: n for step, n in self.micro_batches.items() if step > trace.step}
        step, held = self._left
        named = name_leftovers(trace, held if step == trace.step - 1 else frozenset(), self._libraries)
        if trace.is_complete:
            self._left = trace.step, leftovers(named)
            if self._recorder is not None and (found := libraries_blocks(named, self._libraries.values())):
                self._recorder.workspaces = {**self._recorder.workspaces, **found}
        if self._feed.run is not None:  # what comes before the first forward belongs to no run yet
            self.publisher.publish_trace(dataclasses.replace(named, micro_batches=count))

    def stepped(self, result: StepResult) -> None:
        """A step of the optimizer has ended."""
        self.publisher.stepped(result)
        run = self._feed.run
        if run is not None and run.gauge is None:  # a loop may be over before the gauge's first tick
            self._feed.publish_gauge(dataclasses.replace(self.publisher.read_gauge(), phase=Phase.OPTIMIZER))

    def recomputed(self, event: Recompute) -> None:
        """A checkpointed segment was computed again."""
        self.publisher.recomputed(event)

    def out_of_memory(self, error: BaseException | None, step: int, phase: Phase) -> None:
        """The script ran out of memory; None: it has caught the error."""
        self.publisher.out_of_memory(error, step, phase)
        if error is None:
            self._keep(goes_on=True)
        else:
            self._dies_of_it = True

    def _keep(self, goes_on: bool, ends: bool = False) -> None:
        """Keep a run that ran out of memory, and say where it is.

        Args:
            goes_on: The script does.
            ends: The interpreter does.
        """
        run = self._feed.run
        if run is None or run.refused is None or run.refused.report is None:
            return
        told = keep(run)
        self._feed.tell(told)
        if goes_on:
            say(told.text)
        else:
            last_words = LastWords(told.text, run, run.refused.report)
            (last_words.say if ends else last_words.say_when_it_ends)()

    def failed(self, text: str, detail: str) -> None:
        """Watching itself has failed; the script goes on and viewers keep what they have."""
        self._feed.tell(Refused(text=f"watching failed, the script goes on: {text}", detail=detail))

    def close(self, steps: int, error: BaseException | None, ends: bool = False) -> None:
        """The loop is over: say so, and leave nothing behind.

        Args:
            steps: That it has made.
            error: That ended it.
            ends: The interpreter ends as well.
        """
        if self._closing.is_set():
            return
        reason = "failed" if error is not None else "done"
        text, pinned = f"the loop has ended after {steps} steps", self.publisher.pinned_bytes()
        self._feed.tell(RunEnded(text=text, reason=reason, steps=steps, pinned_bytes=pinned))
        if self._dies_of_it:
            self._keep(goes_on=False, ends=ends)
        self._closing.set()
        if self._server is not None:
            self._server.wake()
        for thread in self._threads:
            thread.join(10.0)
        self.publisher.detach()

    # --- threads ----------------------------------------------------------------

    def _run_thread(self, name: str, target: Any) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        server, engine_lock = self._server, self._engine_lock
        assert server is not None
        assert engine_lock is not None
        try:
            while not self._closing.is_set():
                server.serve(1.0)
            until_s = time.monotonic() + LAST_ANSWERS_S
            while server.viewers and (left_s := until_s - time.monotonic()) > 0:
                server.serve(left_s)
        except Exception:
            log.warning("gpumem-tui: the service has failed; the run goes on", exc_info=True)
        finally:
            engine_lock.release()
            with contextlib.suppress(OSError):
                server.close()
