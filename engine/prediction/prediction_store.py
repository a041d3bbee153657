"""Predictions on disk: what one process has worked out, every other has at once.

An entry is a file in the user's cache folder, named after everything that
decides a prediction: the configuration as far as it decides memory, the GPU, the
libraries, this program's own code. It is written whole or not at all, and read
only as it was written; when there are too many, those not asked for longest go.
Loads no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import zlib
from functools import cache
from importlib import metadata
from pathlib import Path

from ..config import RunConfig
from ..techniques import memory_key
from .gpus import Gpu

LARGEST_BYTES = 256 << 20
"""Of all entries; the oldest quarter goes when there are more."""
LARGEST_ENTRY_BYTES = 64 << 20
"""A larger entry is not kept."""
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Those whose code a prediction runs."""
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

_MAGIC = b"gpumem prediction\n"
_DIGEST_BYTES = 32


class PredictionStore:
    """Bytes by key in a folder. Whatever is wrong with the folder or an entry, the entry is not there.

    Args:
        folder: Made when something is put; None: nothing is kept.
        largest_bytes: Of all entries together.
    """

    def __init__(self, folder: Path | None, largest_bytes: int = LARGEST_BYTES) -> None:
        self._folder, self._largest_bytes = folder, largest_bytes

    def get(self, key: str) -> bytes | None:
        """What was put; None if it is not there. A damaged entry is dropped."""
        path = self._path(key)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        found = _unpacked(content)
        with contextlib.suppress(OSError):
            os.utime(path) if found is not None else path.unlink()
        return found

    def put(self, key: str, value: bytes) -> None:
        """Keep something. What cannot be written is not kept."""
        path = self._path(key)
        if path is None or len(value) > LARGEST_ENTRY_BYTES:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_packed(value))
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._make_room(path.parent)

    def _path(self, key: str) -> Path | None:
        return self._folder / hashlib.sha256(key.encode()).hexdigest() if self._folder is not None else None

    def _make_room(self, folder: Path) -> None:
        """Drop what was not asked for longest, and some more so that it is not done at every entry."""
        entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder))
        total = sum(size for _, size, _ in entries)
        if total <= self._largest_bytes:
            return
        for _, size, path in entries:
            if total <= self._largest_bytes * 3 // 4:
                return
            Path(path).unlink(missing_ok=True)
            total -= size


def _packed(value: bytes) -> bytes:
    body = zlib.compress(value, 1)
    return _MAGIC + hashlib.sha256(body).digest() + body


def _unpacked(content: bytes) -> bytes | None:
    """The inverse of `_packed`; None if it is damaged."""
    start = len(_MAGIC) + _DIGEST_BYTES
    body = content[start:]
    if content[:start] != _MAGIC + hashlib.sha256(body).digest():
        return None
    return zlib.decompress(body)


def default_store() -> PredictionStore:
    """The user's: `$XDG_CACHE_HOME/gpumem-tui/predictions`; one that keeps nothing where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(base) if base.startswith("/") else Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor an entry in passwd
        return PredictionStore(None)
    return PredictionStore(folder / "gpumem-tui" / "predictions")


# --- keys ------------------------------------------------------------------------


def key_of(config: RunConfig, gpu: Gpu) -> str | None:
    """Everything that decides a prediction, in one text; None: it cannot be told here."""
    pretrained = _config_json(config.model) if config.pretrained else ""
    if pretrained is None:
        return None
    return json.dumps(
        {
            "config": json.loads(memory_key(config)),
            "pretrained": pretrained,
            "gpu": dataclasses.asdict(gpu),
            "libraries": {name: _version(name) for name in LIBRARIES},
            "allocator": [os.environ.get(name, "") for name in ALLOCATOR_SETTINGS],
            "code": _code(),
        },
        sort_keys=True,
    )


def _config_json(model: str) -> str | None:
    """A digest of the configuration that `from_pretrained` would read; None if it is not on this machine."""
    path = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
        if not isinstance(found, str):
            return None
        path = Path(found)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _code() -> str:
    """A digest of the engine's own files: a changed model of the GPU predicts anew."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".toml"):
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
