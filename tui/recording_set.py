"""Recordings opened together: a source that is one of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engine.config import RunConfig
from ..engine.events import Environment, Gauge, Milestone, StepTrace
from ..engine.feed import Command, ViewerRole
from ..engine.recording import Replay
from ..engine.techniques import memory_key
from ..profiles import resolved
from .run_state import STEADY_STEPS
from .run_summary import RunSummary, of_source


class RecordingSet:
    """Recordings as a `Source`: the one that is looked at.

    Only that one is in memory; of every other there is a summary, and its file
    is read again when it is looked at.

    Args:
        paths: `.gpumem` files; the first is looked at.

    Raises:
        UserError: One cannot be read, or of several one holds no step to compare.

    Attributes:
        runs: Their summaries in the order named; none of a single one, which is
            summed up as a run of an engine is.
        at: Which is looked at.
    """

    live = False
    role = ViewerRole.OWNER

    def __init__(self, paths: Sequence[Path]) -> None:
        stems = [path.stem for path in paths]
        names = stems if len({*stems}) == len({*paths}) else [str(path.with_suffix("")) for path in paths]
        self._files = list(zip(names, paths, strict=True))
        self._environments: list[Environment | None] = []
        self.runs: list[RunSummary] = []
        for name, path in self._files if len(paths) > 1 else ():
            replay = Replay(path)
            self.runs.append(of_source(replay, name))
            self._environments.append(replay.environment())
        self.look_at(0)

    @property
    def name(self) -> str:
        """Of the one that is looked at."""
        return self._files[self.at][0]

    def look_at(self, index: int) -> None:
        """Be another one.

        Raises:
            UserError: Its file cannot be read any more; it is still the one before.
        """
        self._replay, self.at = Replay(self._files[index][1]), index

    def forget(self, index: int) -> None:
        """Drop one that is not looked at."""
        for kept in (self._files, self._environments, self.runs):
            del kept[index]
        self.at -= self.at > index

    def measured(self) -> dict[str, int]:
        """Peaks by configuration, of those that ran where the one looked at did.

        The same device and the same libraries: with others, a difference would
        not be the technique's.
        """
        found: dict[str, int] = {}
        for run, environment in zip(self.runs, self._environments, strict=True):
            if run.steps >= STEADY_STEPS and _place(environment) == _place(self.environment()):
                key = memory_key(run.config)
                found[key] = max(found.get(key, 0), run.highest_bytes or run.peak_bytes)
        return found

    # --- Source -----------------------------------------------------------------

    def environment(self) -> Environment | None:
        """Where it was recorded."""
        return self._replay.environment()

    def config(self) -> RunConfig | None:
        """The recorded run's."""
        config = self._replay.config()
        return resolved(config) if config is not None else None

    def gauge(self) -> Gauge | None:
        """The last reading before it was saved."""
        return self._replay.gauge()

    def trace(self) -> StepTrace | None:
        """The last one saved."""
        return self._replay.trace()

    def traces(self) -> Sequence[StepTrace]:
        """All that were saved."""
        return self._replay.traces()

    def milestones(self, since: int) -> Sequence[Milestone]:
        """Milestones from an index on."""
        return self._replay.milestones(since)

    def command(self, command: Command) -> None:
        """Refuse.

        Raises:
            UserError: Always.
        """
        self._replay.command(command)


def _place(environment: Environment | None) -> tuple[object, ...]:
    return (environment.device_name, environment.packages) if environment is not None else ()
