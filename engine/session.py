"""The engine thread: one at a time, it starts, holds, restarts and ends runs.

It owns torch, the model and the device. Everything it has to say goes through
the feed; whatever goes wrong in a run ends that run, as an event, and never the
thread. Importing this module loads no torch: the thread does.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import techniques
from .cached_memory import CachedMemory
from .config import RunConfig, UserError, one_line
from .events import Gauge, StepTrace
from .feed import Command, Feed, Pause, Published, Save, Start, Stop, ViewerRole
from .out_of_memory.kept import keep
from .publisher import RunPublisher
from .recording import save, write
from .run import RunKind
from .run_events import Note, Paused, Refused, Resumed, RunEvent, RunFailed
from .trained_run import RunLeft, TrainedRun

if TYPE_CHECKING:
    import torch

    from .peers import Peers
    from .tracing.recorder import Recorder


class Session(Published):
    """An engine in this process; a `Source`.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:<i>`.
        on_trace: See `Feed`.
        name: Of the engine, for the runs' identity.
        peers: The other ranks, if it is one of several.
    """

    live = True
    role = ViewerRole.OWNER

    def __init__(
        self,
        device: str = "auto",
        on_trace: Callable[[StepTrace], None] | None = None,
        name: str = "",
        peers: Peers | None = None,
    ) -> None:
        self._wanted, self._peers = device, peers
        self._feed = Feed(name, on_trace, peers.rank if peers is not None else 0)
        self._publisher, self._cached = RunPublisher(self._feed), CachedMemory()
        self._commands: queue.Queue[Start | Stop | None] = queue.Queue()
        self._resume = threading.Event()
        self._resume.set()
        self._recorder: Recorder | None = None
        self._device: torch.device | None = None
        self._refused: str | None = None
        self._good: RunConfig | None = None
        self._changing = threading.Lock()
        self._running = self._lost = False
        self._leaving: list[torch.utils.hooks.RemovableHandle] = []
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    # --- Source -------------------------------------------------------------

    def command(self, command: Command) -> None:
        """Ask for something.

        Raises:
            UserError: The configuration cannot run; nothing was stopped for it.
        """
        if self._refused is not None:
            raise UserError(self._refused)
        if self._peers is not None and not self._peers.leads and not isinstance(command, Save):
            raise UserError("rank 0 commands this job")
        match command:
            case Start(config):
                techniques.check(config, self._feed.environment)
                self._idle.clear()
                self._interrupt(command)
            case Stop():
                self._interrupt(command)
            case Pause(paused):
                (self._resume.clear if paused else self._resume.set)()
                self._feed.tell(Paused(text="held") if paused else Resumed(text="goes on"))
            case Save():
                threading.Thread(target=self._save, args=(command,), name="save", daemon=True).start()

    def save(self, path: Path) -> None:
        """Write a recording of the run so far, or of the one that ended last.

        Raises:
            OSError: It cannot be written there.
            UserError: There is nothing to save yet.
        """
        write(path, [self.run] if self.run is not None else [])

    # --- for whoever made the session -----------------------------------------

    def close(self, timeout_s: float = 30.0) -> None:
        """End the run and the thread; returns when they have ended."""
        self._closing.set()
        self._interrupt(None)
        self._thread.join(timeout_s)

    @property
    def over(self) -> bool:
        """True once its thread has ended: it was closed, or a rank of the job has failed."""
        return not self._thread.is_alive()

    @property
    def lost(self) -> bool:
        """True if a rank of the job has failed: collectives have lost step, and only new processes can run."""
        return self._lost

    def tell(self, event: RunEvent) -> None:
        """Add an event from outside of the engine's thread."""
        self._feed.tell(event)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until there is nothing left to run; False if that took too long."""
        return self._idle.wait(timeout_s)

    def _interrupt(self, command: Start | Stop | None) -> None:
        """Have a command taken: the run under way is left where its next module or optimizer begins, or weight loads.

        The hooks are there from here on only: on every step of a launch-bound run they would cost 2 %.
        """
        self._commands.put(command)
        self._resume.set()
        with self._changing:
            if self._running and not self._leaving and self._peers is None:
                from torch.nn.modules.module import register_module_forward_pre_hook
                from torch.optim.optimizer import register_optimizer_step_pre_hook

                self._leaving = [register(self._leave_if_asked) for register in (
                    register_module_forward_pre_hook, register_optimizer_step_pre_hook
                )]  # fmt: skip

    # --- the thread -----------------------------------------------------------

    def _main(self) -> None:
        try:
            self._look_around()
        except Exception as error:  # a refusal, or a torch that does not load: nothing can ever run here
            self._refused, self._lost = one_line(error), self._peers is not None
            self._feed.tell(Refused(text=self._refused))
            self._idle.set()
            return
        gauge = threading.Thread(
            target=self._publisher.gauge_forever, args=(self._closing, self._read_gauge), name="gauge", daemon=True
        )
        gauge.start()
        while not self._lost:
            try:
                if (command := self._next()) is None:
                    break
                if isinstance(command, Start):
                    self._run_and_report(command.config)
                if self._commands.empty():
                    self._cached.settled()
            except Exception as error:  # a device that has failed fails again when it is cleaned up; a rank has gone
                self._lost = self._peers is not None
                self._feed.tell(RunFailed(text=one_line(error), detail=traceback.format_exc()))
            if self._commands.empty():
                self._idle.set()
        self._cached.close()
        self._idle.set()

    def _next(self) -> Start | Stop | None:
        """Wait for a command; of several ranks, for what rank 0 is told."""
        peers = self._peers
        if peers is not None and not peers.leads:
            heard = peers.hear()
            self._idle.clear()
            return heard
        command = self._commands.get()
        if peers is not None and not isinstance(command, Stop):  # what is stopped has been left already
            peers.tell(command)
        return command

    def _read_gauge(self) -> Gauge:
        self._cached.quiet()
        return self._publisher.read_gauge()

    def _look_around(self) -> None:
        from . import device

        self._device = device.select(self._wanted)
        if self._peers is not None:
            self._peers.join(self._device)
        elif self._device.type == "cpu":
            device.leave_a_core()
        self._publisher.look_around(self._device)

    def _run_and_report(self, config: RunConfig) -> None:
        """Run once; whatever happens becomes events."""
        try:
            techniques.check(config, self._feed.environment)  # which may not have been known when it was asked for
        except UserError as error:
            self._feed.tell(Refused(text=str(error)))
            return
        self._publisher.limit_memory(config.memory_limit_bytes)
        self._publisher.begin(config, RunKind.TRAINED, techniques.describe(config))
        problem = self._run(config)
        run = self._feed.run
        if problem is not None and run is not None and run.refused is not None:
            self._feed.tell(keep(run))
        if self._peers is not None:
            self._lost = problem is not None
            return
        steps = self._publisher.steps
        if problem is None or steps:
            self._good = config if steps else self._good
            return
        if self._good is not None and self._good != config and self._commands.empty():
            self._feed.tell(Note(text=f"going back to the run before: {techniques.describe(self._good)}"))
            self._commands.put(Start(self._good))

    def _run(self, config: RunConfig) -> str | None:
        """Run, free everything, count what leaks.

        Returns:
            The reason why it failed, or None.
        """
        assert self._device is not None
        self._recorder = self._recorder_for(config)
        run = TrainedRun(
            config, self._device, self._recorder, self._feed, self._publisher, self._cached, self._peers,
            between=self._between, leave_if_asked=self._leave_if_asked,
        )  # fmt: skip
        self._running = True
        problem = run.train()
        self._unhook()
        run.clean_up(problem)
        return problem

    def _recorder_for(self, config: RunConfig) -> Recorder:
        """One for all runs on a GPU: the first thing on the device are its workspaces. On a CPU each has its own."""
        from .tracing.allocator_trace import AllocatorTrace
        from .tracing.op_tracker import OpTracker

        assert self._device is not None
        if self._device.type == "cuda":
            return self._recorder or AllocatorTrace(self._device)
        return OpTracker(memory_limit_bytes=config.memory_limit_bytes)

    def _unhook(self) -> None:
        """Undo what `_interrupt` has installed."""
        with self._changing:
            self._running = False
            for hook in self._leaving:
                hook.remove()
            self._leaving.clear()

    def _between(self) -> None:
        """Before every micro-batch: hold while paused, leave when asked to."""
        self._resume.wait()
        if self._peers is None:
            self._leave_if_asked()
        elif self._peers.all_leave(not self._commands.empty()):
            raise RunLeft

    def _leave_if_asked(self, *_: object) -> None:
        """Leave anywhere, but not where other ranks would wait for this one."""
        if self._peers is None and not self._commands.empty():
            raise RunLeft

    def _save(self, command: Save) -> None:
        self._feed.tell(save(command, self.runs()))
