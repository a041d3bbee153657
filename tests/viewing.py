"""Viewers of an engine, the command line, and what they leave on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.engine_registry import EngineDir, Job
from gpumem_tui.engine.feed import ViewerRole
from gpumem_tui.engine.job_source import JobSource
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.remote import Remote, peek
from gpumem_tui.engine.run_events import RunEvent, StepEnded

from .terminal import until

SMALL = ["--device", "cpu", "--batch-size", "2", "--seq-len", "16", "--set", "rows=8"]


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpumem_tui.tui", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def left_over(home: Path) -> list[str]:
    """Sockets, folders and temporary files that should not be there any more."""
    ours = {home / "run" / "gpumem-tui", home / "run" / "gpumem-tui" / ".lock"}
    walks = (
        walk for folder in ("run", "tmp") for walk in os.walk(home / folder)
    )  # minds no folder that goes meanwhile
    found = {Path(at, name) for at, folders, files in walks for name in (*folders, *files)}
    # torch makes a cache folder for its compiler, whoever imports it.
    return [str(path) for path in found - ours if not path.name.startswith("torchinductor")]


def step_of(engine_dir: EngineDir) -> int:
    status = peek(engine_dir)
    return status.step if status is not None else 0


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Viewers:
    """Viewers of one engine in this process, detached when the test is over."""

    def __init__(self) -> None:
        self.all: list[JobSource | Remote] = []

    def start(self, config: RunConfig, linger_s: float | None = None) -> JobSource:
        source = JobSource(Launcher(linger_s))
        self.all.append(source)
        source.start(config)
        until(lambda: source.events(0) and source.role is ViewerRole.ATTACHED, lambda: source.events(0))
        return source

    def attach_job(self, job: Job) -> JobSource:
        source = JobSource()
        self.all.append(source)
        source.attach(job)
        return source

    def attach(self, engine_dir: EngineDir | None, take: bool = False, only_look: bool = False) -> Remote:
        assert engine_dir is not None
        remote = Remote(engine_dir, take=take, only_look=only_look)
        self.all.append(remote)
        remote.attach()
        return remote


def kinds(viewer: JobSource | Remote) -> list[type[RunEvent]]:
    return [type(m) for m in viewer.events(0)]


def steps(viewer: JobSource | Remote) -> int:
    return kinds(viewer).count(StepEnded)
