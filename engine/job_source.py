"""The engines of a job as one `Source`: its ranks, or a single engine; and starting others in their place.

Rank 0 is commanded, and tells the others. What every rank has to show are Runs with
its `rank`; of the others' events those are told here that say of a problem. Runs and
events of engines that were there before stay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import msgspec

from .config import RunConfig, UserError
from .engine_registry import EngineDir, Job
from .events import Environment, Gauge
from .feed import Command, End, Feed, Save, Start, ViewerRole
from .launch import Launcher
from .recording import save
from .remote import ASK_EVERY_S, Remote
from .run import Run
from .run_events import EngineEnded, Note, OutOfMemory, RunEvent, RunFailed, placed

OTHERS_END_WITHIN_S = 5.0
"""After the first of a job's ranks has ended."""
ENDS_WITHIN_S = 20.0
"""An engine that has been told to end: in order, or else killed."""


class JobSource:
    """A viewer's end of the sockets.

    Args:
        launch: Starts engines; None: none can be started from here.
        take: Command them, whoever does now.
        only_look: Never command them, and do not count among their viewers.
        version: Of this program, for the line about another version's engine.
        ask_every_s: How often they are asked.

    Attributes:
        members: The engines, by rank; none before the first have started.
    """

    live = True

    def __init__(
        self,
        launch: Launcher | None = None,
        *,
        take: bool = False,
        only_look: bool = False,
        version: str = "",
        ask_every_s: float = ASK_EVERY_S,
    ) -> None:
        self._launch, self._take, self._only_look = launch, take, only_look
        self._version, self._ask_every_s = version, ask_every_s
        self.members: tuple[Remote, ...] = ()
        self._before: list[Run] = []
        self._log = Feed()
        self._heard: list[int] = []
        self._lock = threading.RLock()
        self._starting: threading.Thread | None = None
        self._ending: threading.Thread | None = None
        self._waiting: list[Command] = []
        self._gone = self._closing = self._of_job = False

    # --- Source -------------------------------------------------------------

    @property
    def role(self) -> ViewerRole:
        """The role towards rank 0; while engines are being started they may be commanded."""
        if self._gone:
            return ViewerRole.GONE
        role = self.members[0].role if self.members else ViewerRole.ATTACHED
        return ViewerRole.ATTACHED if role is ViewerRole.GONE else role  # which is told once all have ended

    @property
    def gone(self) -> bool:
        """True if the engines have ended and others cannot be started."""
        return self._gone and self._launch is None

    def environment(self) -> Environment | None:
        """That of rank 0."""
        return self.members[0].environment() if self.members else None

    def gauge(self) -> Gauge | None:
        """That of rank 0."""
        return self.members[0].gauge() if self.members and not self._gone else None

    @property
    def run(self) -> Run | None:
        """The run of rank 0 that is under way or begun last."""
        runs = self.runs()
        return runs[-1] if runs else None

    def runs(self) -> Sequence[Run]:
        """All runs that are kept, in the order they began; of each the ranks from the highest down to 0."""
        there = [run for member in self.members for run in member.runs()]
        if len(self.members) > 1:
            there.sort(key=lambda run: (run.id.number, -run.id.rank))
        return [*self._before, *there]

    def events(self, since: int = 0) -> Sequence[RunEvent]:
        """Events from an index on."""
        self._gather()
        return self._log.events(since)

    def command(self, command: Command) -> None:
        """Pass a command on; saving happens on this side, whoever commands.

        Raises:
            UserError: It is refused at once.
        """
        if isinstance(command, Save):
            threading.Thread(target=self._save, args=(command,), name="save", daemon=True).start()
        elif self._gone:
            if not isinstance(command, Start) or self._launch is None:
                raise UserError("the engine has gone; s saves what was seen, q quits")
            self.start(command.config)
        else:
            with self._lock:
                if self._is_starting:
                    self._waiting.append(command)
                else:
                    self._pass_on(command)

    def _pass_on(self, command: Command) -> None:
        first = self.members[0]
        if isinstance(command, Start) and first.role is ViewerRole.ATTACHED and self._launch is not None:
            wanted = ranks_of(command.config) or (len(self.members) if self._of_job else 0)
            if wanted != len(self.members):
                self._say(Note(text="other processes are started: the ranks of a job are as many from start to end"))
                first.command(End())
                self.start(command.config)
                return
            if self._of_job:
                command = Start(command.config.with_({"parallel.ranks": wanted}))
        first.command(command)

    # --- for whoever made it --------------------------------------------------

    @property
    def engine_dir(self) -> EngineDir | None:
        """The folder of rank 0."""
        return self.members[0].engine_dir if self.members else None

    def start(self, config: RunConfig) -> None:
        """Have engines started for a configuration, once those before have ended; returns at once.

        Raises:
            UserError: There is no way to start one.
        """
        if self._launch is None:
            raise UserError("no engine can be started from here")
        self._starting = threading.Thread(target=self._begin, args=(config, self._launch), name="starting", daemon=True)
        self._gone = False
        self._starting.start()

    def attach(self, job: Job) -> None:
        """Attach to engines that are there.

        Raises:
            UserError: One is not, or is of another version.
        """
        self._join(job.members)

    def wait_up_to_date(self) -> None:
        """Wait until everything is here that the engines have to show.

        Raises:
            UserError: One has ended before.
        """
        for member in self.members:
            member.wait_up_to_date()

    def close(self) -> None:
        """Detach."""
        self._closing = True
        for thread in (self._starting, self._ending):
            if thread is not None and thread.is_alive():  # Ctrl-C may have come before it was started
                thread.join(10.0)
        for member in self.members:
            member.close()
        if self._launch is not None:
            self._launch.let_go()

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for the engines to end, after they were told to; what they said last has been heard then."""
        until_s = time.monotonic() + timeout_s
        ended = [member.wait_ended(max(0.0, until_s - time.monotonic())) for member in self.members]
        if self._ending is not None:
            self._ending.join(max(0.0, until_s - time.monotonic()))
        if self._of_job and self._launch is not None and all(ended):
            self._launch.ending()  # what has started the ranks follows them
        return all(ended)

    # --- starting -------------------------------------------------------------

    @property
    def _is_starting(self) -> bool:
        return self._starting is not None

    def _begin(self, config: RunConfig, launch: Launcher) -> None:
        try:
            self._retire()
            self._join((launch(config),) if ranks_of(config) == 1 else launch.job(config).members)
        except UserError as error:
            self._end(str(error))
        finally:
            with self._lock:
                self._starting, waiting, self._waiting = None, self._waiting, []
                for command in waiting if self.members else []:
                    self._pass_on(command)

    def _retire(self) -> None:
        """Wait until the engines there were have ended, and keep what they have shown."""
        old = self.members
        for member in old:
            member.wait_ended(ENDS_WITHIN_S)
        self._gather()
        with self._lock:
            self._before, self.members, self._heard = [*self.runs()], (), []
        for member in old:
            member.close()

    def _join(self, engines: Sequence[EngineDir]) -> None:
        last, late_s = self._before[-1].id.number if self._before else 0, self._latest_s()
        members: list[Remote] = []
        for engine_dir in engines:
            member = Remote(
                engine_dir, take=self._take, only_look=self._only_look, version=self._version,
                ask_every_s=self._ask_every_s, after_run=last, after_s=late_s, on_lost=self._one_has_ended,
            )  # fmt: skip
            members.append(member)
            member.attach()
        info = engines[0].info()
        with self._lock:
            self.members, self._heard = tuple(members), [0] * len(members)
            self._ending, self._of_job = None, info is not None and bool(info.job)
        if any(member.lost for member in members):  # before anybody was told
            self._one_has_ended()

    # --- what they tell -------------------------------------------------------

    def _gather(self) -> None:
        """Take over what has been told: by rank 0 everything, by the others what is a problem."""
        with self._lock:
            for rank, member in enumerate(self.members):
                for event in member.events(self._heard[rank]):
                    self._heard[rank] = event.index + 1
                    if isinstance(event, EngineEnded):  # told once, of all
                        continue
                    if rank and event.is_problem:
                        self._log.relay(msgspec.structs.replace(event, text=f"rank {rank}: {event.text}"))
                    elif not rank:
                        self._log.relay(event)

    def _one_has_ended(self) -> None:
        with self._lock:
            if self._is_starting or self._ending is not None or self._closing or not self.members:
                return
            self._ending = threading.Thread(target=self._all_end, args=(self.members,), name="ending", daemon=True)
            self._ending.start()

    def _all_end(self, members: Sequence[Remote]) -> None:
        """Tell of the end once, when the last rank has followed the first."""
        until_s = time.monotonic() + OTHERS_END_WITHIN_S
        for member in members:
            member.wait_ended(max(0.0, until_s - time.monotonic()))
        self._gather()
        lost = sorted((m for m in members if m.lost is not None), key=lambda m: m.lost.at_s if m.lost else 0.0)
        first = next((m for m in lost if m.lost and not m.lost.by), lost[0])  # the others were told to end
        assert first.lost is not None
        self._end(self._why(first, members), first.lost.by, first.lost.detail)

    def _why(self, first: Remote, members: Sequence[Remote]) -> str:
        """The reason why the engines have ended, and the one it began with."""
        assert first.lost is not None
        why, by = first.lost.why, first.lost.by
        how = self._launch.ending() if self._launch is not None and not by else ""
        if not self._of_job or by:
            return f"{why} ({how})" if how else why
        events = first.run.events() if first.run is not None else []
        failed = next((event.text for event in events if isinstance(event, RunFailed | OutOfMemory)), "")
        said = f"rank {members.index(first)}: {failed or why}"
        return f"{how if how and not failed else said}; the job has ended with it"

    def _end(self, why: str, by: str = "", detail: str = "") -> None:
        what = ["s saves what was seen"] if self.runs() else []
        what += ["r starts the run again"] if self._launch is not None else []
        self._say(EngineEnded(text=f"{why}; {', '.join([*what, 'q quits'])}", by=by, detail=detail))
        self._gone = True

    def _say(self, event: RunEvent) -> None:
        run = self.run
        self._log.relay(placed(event, 0, self._latest_s(), run.id.number if run is not None else 0))

    def _latest_s(self) -> float:
        """The engines' clock as far as it is known here."""
        gauge, told = self.gauge(), self._log.events(0)
        return max(gauge.time_s if gauge else 0.0, told[-1].time_s if told else 0.0)

    def _save(self, command: Save) -> None:
        self._say(save(command, self.runs()))


def ranks_of(config: RunConfig) -> int:
    """Processes that a configuration is of; 0: as many as there are GPUs."""
    return 1 if config.text("parallel") == "none" else config.integer("parallel.ranks")
