"""A run of several ranks without the app: its engines are started, followed to their end, and leave nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...engine.config import RunConfig, UserError
from .common import without_keys

if TYPE_CHECKING:
    from ...engine.events import Gauge
    from ...engine.job_source import JobSource
    from ...engine.run_events import RunEvent

LOOK_EVERY_S = 0.05
ENDS_WITHIN_S = 20.0


@contextmanager
def job_of(config: RunConfig) -> Iterator[JobSource]:
    """Ranks that train `config` for as long as the block lasts."""
    from ...engine.feed import ViewerRole
    from ...engine.job_source import JobSource
    from ...engine.launch import Launcher
    from ...engine.service import version

    launcher = Launcher()
    source = JobSource(launcher, version=version())
    source.start(config)
    try:
        yield source
    finally:
        if source.role is not ViewerRole.GONE:
            end(source)
        launcher.kill()
        source.close()


def end(source: JobSource) -> None:
    """Have the ranks end, and hear what they say last."""
    from ...engine.feed import End

    source.command(End())
    source.wait_ended(ENDS_WITHIN_S)


def reported_job(source: JobSource, say: Callable[[RunEvent], None] = lambda _: None) -> dict[str, Any]:
    """The document of a job, once every rank has ended its run: that of the highest, with a line for each.

    Raises:
        UserError: The ranks could not be started, or would not run it.
    """
    from ...engine.feed import ViewerRole
    from ...engine.report import of_job, report

    failure, heard, never = None, 0, threading.Event()
    while failure is None and not _all_ended(source):
        for event in source.events(heard):
            heard = event.index + 1
            say(event)
        if source.role is ViewerRole.GONE:
            failure = without_keys(source.events(0)[-1].text)
        never.wait(LOOK_EVERY_S)
    runs = source.runs()
    if not runs:
        raise UserError(failure or "no rank has started")
    if failure is None:
        end(source)
    by_rank = {run.id.rank: report(run) for run in runs}
    outside = {run.id.rank: size for run in runs if (size := _outside_torch_bytes(run.gauge)) is not None}
    return of_job(by_rank, outside).as_dict() | ({"failure": failure} if failure else {})


def _all_ended(source: JobSource) -> bool:
    runs = source.runs()
    return bool(runs) and len(runs) == len(source.members) and all(run.ended for run in runs)


def _outside_torch_bytes(gauge: Gauge | None) -> int | None:
    """This rank's bytes on its GPU beyond torch's; in a container, where NVML tells of no process, everybody's."""
    if gauge is None or gauge.reserved_bytes is None:
        return None
    if gauge.beyond_torch_bytes is not None or gauge.device_used_bytes is None:
        return gauge.beyond_torch_bytes
    return gauge.device_used_bytes - gauge.reserved_bytes
