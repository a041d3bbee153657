"""The folders of this machine's engines: one each, held by a lock that dies with its process.

    <runtime>/gpumem-tui/           mode 0700, ours
        .lock                       held while a folder is made or cleaned
        tiny/                       the engine's name
            lock  card.json  socket  log

The runtime folder is `XDG_RUNTIME_DIR`, or else a private folder among the
temporary files. A folder whose lock nobody holds was left by a crash: whoever
starts an engine next removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from .config import UserError
from .forks import in_child

SOCKET_PATH_MAX = 107
"""Bytes in the path of a Unix socket on Linux (sun_path, without its zero)."""
LONGEST_NAME = 40
JOB, WARM = "job", "warm"
"""Kinds of processes that are no engines."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine's own account of itself, for those who list engines.

    Attributes:
        name: Of its folder.
        pid: The process.
        kind: `run`: a process of its own; `watch`: inside somebody's script; `job`: what has started the ranks
            of a job, and listens to nobody; `warm`: predicts for other commands.
        protocol: Of its socket.
        version: Of this program.
        started_s: Unix time.
        job: The job whose rank it is; empty: it is alone.
        rank: Of the job.
        ranks: That the job has.
    """

    name: str
    pid: Annotated[int, msgspec.Meta(ge=1)]
    kind: str
    protocol: int
    version: str
    started_s: float
    job: str = ""
    rank: int = 0
    ranks: int = 1


class EngineDir:
    """An engine's folder, seen from inside or outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.folder.name

    @property
    def socket(self) -> Path:
        """The socket that the engine listens on."""
        return self.folder / "socket"

    @property
    def log(self) -> Path:
        """The file that takes all that the engine and its libraries print."""
        return self.folder / "log"

    @property
    def lock(self) -> Path:
        """Held by the engine as long as it lives."""
        return self.folder / "lock"

    def info(self) -> EngineInfo | None:
        """The engine's account of itself; None if it cannot be read."""
        try:
            return msgspec.json.decode((self.folder / "card.json").read_bytes(), type=EngineInfo)
        except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            return None

    def alive(self) -> bool:
        """True if its process is: the kernel drops the lock with the process."""
        try:
            handle = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False


class EngineLock:
    """A folder of one's own, held until `release` or until the process ends.

    Args:
        wanted: The name it would like; a number is added if it is taken.
        kind: See `EngineInfo`.
        protocol: See `EngineInfo`.
        version: See `EngineInfo`.
        job: See `EngineInfo`.
        rank: See `EngineInfo`.
        ranks: See `EngineInfo`.

    Raises:
        UserError: There is no safe place for it.
    """

    def __init__(
        self, wanted: str, kind: str, protocol: int, version: str, job: str = "", rank: int = 0, ranks: int = 1
    ) -> None:
        with _changing() as root:
            _clean(root)
            self.engine_dir = EngineDir(_free_folder(root, wanted))
            self._handle = os.open(self.engine_dir.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        self.pid = os.getpid()
        in_child(self._forget_in_child)
        info = EngineInfo(self.engine_dir.name, self.pid, kind, protocol, version, time.time(), job, rank, ranks)
        try:
            (self.engine_dir.folder / "card.json").write_bytes(msgspec.json.encode(info))
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Remove the folder with all that is in it."""
        if self._handle < 0 or self.pid != os.getpid():  # a fork of the engine owns nothing
            return
        shutil.rmtree(self.engine_dir.folder, ignore_errors=True)
        self._let_go()

    def _forget_in_child(self) -> None:
        """A fork that outlives the engine does not keep it looking alive."""
        if self._handle >= 0:
            self._let_go()

    def _let_go(self) -> None:
        os.close(self._handle)
        self._handle = -1


def runtime_folder() -> Path:
    """The folder of all engines of this user, made if it is not there.

    Raises:
        UserError: It belongs to somebody else, or there is nowhere to have one.
    """
    for folder in _candidates():
        if len(os.fsencode(folder)) + LONGEST_NAME + len("/-99/socket") > SOCKET_PATH_MAX:
            continue
        with contextlib.suppress(OSError):  # a folder that cannot be written: the next one
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            found = folder.lstat()
        except OSError:
            continue
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise _of_another(folder, found.st_uid)
        if os.access(folder, os.W_OK | os.X_OK):
            if stat.S_IMODE(found.st_mode) != 0o700:
                folder.chmod(0o700)
            return folder
    raise UserError("the engine's socket needs a folder that can be written; XDG_RUNTIME_DIR or TMPDIR may name one")


def _candidates() -> Iterator[Path]:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and Path(base).is_dir():
        owner = Path(base).stat().st_uid
        if os.getuid() == 0 and owner != 0:  # sudo -E: a folder of root's would lock its owner out
            raise _of_another(Path(base), owner)
        yield Path(base) / "gpumem-tui"
    private = f"gpumem-tui-{os.getuid()}"
    with contextlib.suppress(OSError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / private
    yield Path("/tmp") / private


def _of_another(folder: Path, uid: int) -> UserError:
    try:
        owner = pwd.getpwuid(uid).pw_name
    except KeyError:
        owner = f"user {uid}"
    return UserError(f"{folder} belongs to {owner}; set XDG_RUNTIME_DIR to a folder of yours, or unset it")


def clean() -> None:
    """Remove what crashed engines left."""
    with _changing() as root:
        _clean(root)


def engines() -> list[EngineDir]:
    """The engines that are alive and listen, oldest first."""
    return [engine_dir for engine_dir, kind in _alive() if kind not in (JOB, WARM)]


def warm_servers() -> list[EngineDir]:
    """The servers that `gpumem-tui warm` has started and that are alive, oldest first; none where none can be."""
    try:
        return [engine_dir for engine_dir, kind in _alive() if kind == WARM]
    except UserError:
        return []


def _alive() -> list[tuple[EngineDir, str]]:
    """The folders whose processes are alive, oldest first, and of what kind each is; "": it does not say."""
    alive = [(engine_dir, engine_dir.info()) for engine_dir in _engine_dirs(runtime_folder()) if engine_dir.alive()]
    alive.sort(key=lambda pair: pair[1].started_s if pair[1] is not None else 0.0)
    return [(engine_dir, info.kind if info is not None else "") for engine_dir, info in alive]


@dataclass(frozen=True, slots=True)
class Job:
    """Engines that belong together: the ranks of a job, or one that is alone.

    Attributes:
        name: Of the job.
        members: By rank.
        ranks: As many as there are to be.
    """

    name: str
    members: tuple[EngineDir, ...]
    ranks: int = 1


def jobs() -> list[Job]:
    """All engines that are alive, oldest first, ranks joined."""
    found: dict[str, list[tuple[int, EngineDir]]] = {}
    sizes: dict[str, int] = {}
    for engine_dir in engines():
        info = engine_dir.info()
        name = info.job if info is not None and info.job else engine_dir.name
        found.setdefault(name, []).append((info.rank if info is not None else 0, engine_dir))
        sizes[name] = info.ranks if info is not None else 1
    return [
        Job(name, tuple(e for _, e in sorted(members, key=lambda m: (m[0], m[1].name))), sizes[name])
        for name, members in found.items()
    ]


def find(wanted: str | None, servers: bool = False) -> Job:
    """The job of a name, or of an engine's name or process id; the only one there is if none is given.

    Args:
        wanted: Name or process id.
        servers: Whether a server that predicts will do as well: by its name, or where there is no engine.

    Raises:
        UserError: There is none, or it is not clear which.
    """
    there = jobs()
    if servers and (wanted is not None or not there):
        there += [Job(server.name, (server,)) for server in warm_servers()]
    names = ", ".join(job.name for job in there)
    if not there:
        called = f" called {wanted}" if wanted is not None else ""
        raise UserError(f"no engine{called} is running" + ("" if servers else "; gpumem-tui starts one"))
    if wanted is None:
        if len(there) > 1:
            raise UserError(f"several engines are running, name one: {names}")
        return there[0]
    job = job_of(wanted, there)
    if job is None:
        raise UserError(f"no engine is called {wanted}; running: {names}")
    return job


def job_of(wanted: str, there: Sequence[Job]) -> Job | None:
    """The job of a name, or of an engine's name or process id; None if it is not there."""
    return next(
        (job for job in there if wanted == job.name or any(_is(engine_dir, wanted) for engine_dir in job.members)),
        None,
    )


def _is(engine_dir: EngineDir, wanted: str) -> bool:
    info = engine_dir.info()
    return wanted == engine_dir.name or (info is not None and wanted == str(info.pid))


@contextmanager
def _changing() -> Iterator[Path]:
    """Alone with the folder of folders."""
    root = runtime_folder()
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield root
    finally:
        os.close(handle)


def _engine_dirs(root: Path) -> list[EngineDir]:
    return [EngineDir(folder) for folder in sorted(root.iterdir()) if folder.is_dir()]


def _clean(root: Path) -> None:
    for engine_dir in _engine_dirs(root):
        if not engine_dir.alive():
            shutil.rmtree(engine_dir.folder, ignore_errors=True)


def _free_folder(root: Path, wanted: str) -> Path:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("-.")[:LONGEST_NAME] or "engine"
    number = 1
    while True:
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return folder
