"""Where engines live on this machine: one folder each, held by a lock that dies with its process.

    <runtime>/gpumem-tui/           mode 0700, ours
        .lock                       held while a folder is made or cleaned
        tiny/                       the engine's name
            lock  card.json  socket  log

The runtime folder is `XDG_RUNTIME_DIR`, or else a private folder among the
temporary files. A folder whose lock nobody holds was left by a crash: whoever
starts an engine next removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .config import UserError

SOCKET_PATH_MAX = 107
"""Bytes in the path of a Unix socket on Linux (sun_path, without its zero)."""
LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Card:
    """What an engine says of itself to those who list engines.

    Attributes:
        name: Of its folder.
        pid: The process.
        kind: `run`: a process of its own; `watch`: inside somebody's script.
        protocol: Of its socket.
        version: Of this program.
        started_s: Unix time.
    """

    name: str
    pid: int
    kind: str
    protocol: int
    version: str
    started_s: float


class Place:
    """An engine's folder, seen from inside or outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.folder.name

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / "socket"

    @property
    def log(self) -> Path:
        """What it and its libraries print."""
        return self.folder / "log"

    @property
    def lock(self) -> Path:
        """Held by the engine as long as it lives."""
        return self.folder / "lock"

    def card(self) -> Card | None:
        """Who it is; None if that cannot be read."""
        try:
            return Card(**json.loads((self.folder / "card.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def alive(self) -> bool:
        """Whether its process is: the kernel drops the lock with the process."""
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


class Claim:
    """A folder of one's own, held until `release` or until the process ends.

    Args:
        wanted: The name it would like; a number is added if it is taken.
        kind: See `Card`.
        protocol: See `Card`.
        version: See `Card`.

    Raises:
        UserError: There is no safe place for it.
    """

    def __init__(self, wanted: str, kind: str, protocol: int, version: str) -> None:
        with _changing() as root:
            _clean(root)
            self.place = Place(_free_folder(root, wanted))
            self._handle = os.open(self.place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        card = Card(self.place.name, os.getpid(), kind, protocol, version, time.time())
        (self.place.folder / "card.json").write_text(json.dumps(asdict(card)), encoding="utf-8")
        self.pid = os.getpid()

    def release(self) -> None:
        """Remove the folder with all that is in it."""
        if self._handle < 0 or self.pid != os.getpid():  # a fork of the engine owns nothing
            return
        shutil.rmtree(self.place.folder, ignore_errors=True)
        os.close(self._handle)
        self._handle = -1


def runtime_folder() -> Path:
    """The folder of all engines of this user, made if it is not there.

    Raises:
        UserError: Somebody else owns it or could read it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    private = Path(tempfile.gettempdir()) / f"gpumem-tui-{os.getuid()}"
    folder = Path(base) / "gpumem-tui" if base and Path(base).is_dir() else private
    if len(os.fsencode(folder)) + LONGEST_NAME + len("/-99/socket") > SOCKET_PATH_MAX:
        folder = private
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; the engine's socket needs a private folder") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"{folder} belongs to somebody else; set XDG_RUNTIME_DIR to a folder of yours")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def clean() -> None:
    """Remove what crashed engines left."""
    with _changing() as root:
        _clean(root)


def engines() -> list[Place]:
    """Those that are alive, oldest first."""
    found = [(card.started_s, place) for place in _places(runtime_folder()) if (card := place.card()) and place.alive()]
    return [place for _, place in sorted(found, key=lambda pair: pair[0])]


def find(wanted: str | None) -> Place:
    """The engine of a name or of a process id; the only one there is if none is given.

    Raises:
        UserError: There is none, or it is not clear which.
    """
    there = engines()
    names = ", ".join(place.name for place in there)
    if not there:
        raise UserError("no engine is running; gpumem-tui starts one")
    if wanted is None:
        if len(there) > 1:
            raise UserError(f"several engines are running, name one: {names}")
        return there[0]
    for place in there:
        card = place.card()
        if wanted == place.name or (card is not None and wanted == str(card.pid)):
            return place
    raise UserError(f"no engine is called {wanted}; running: {names}")


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


def _places(root: Path) -> list[Place]:
    return [Place(folder) for folder in sorted(root.iterdir()) if folder.is_dir()]


def _clean(root: Path) -> None:
    for place in _places(root):
        if not place.alive():
            shutil.rmtree(place.folder, ignore_errors=True)


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
