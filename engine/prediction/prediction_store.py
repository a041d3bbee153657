"""Predictions on disk: what one process of a user has worked out, every other has at once.

An entry is named after everything that decides a prediction: the configuration
as far as it decides memory, the GPU, the libraries, this program's own code.
Loads no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ..config import RunConfig, UserError
from ..techniques import memory_key
from ..techniques.parallel import ranks
from ..user_folders import user_folder
from ..wire import MalformedError
from .disk_cache import DiskCache
from .gpus import Gpu
from .outcome import Prediction

LARGEST_BYTES = 256 << 20
"""The most that all predictions take; one takes some hundred kilobytes."""
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Those whose code a prediction runs."""
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class PredictionStore:
    """The predictions for a GPU that any process of this user has made.

    Args:
        gpu: Which one.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._disk = gpu, DiskCache(_folder(), LARGEST_BYTES)

    def get(self, config: RunConfig, rank: int | None = None) -> Prediction | None:
        """A prediction; None if nobody has made it."""
        key = key_of(config, self._gpu, rank)
        packed = self._disk.get(key) if key is not None else None
        if key is None or packed is None:
            return None
        try:
            return Prediction.unpacked(packed, config)
        except (MalformedError, UserError):
            self._disk.drop(key)
            return None

    def put(self, config: RunConfig, packed: bytes, rank: int | None = None) -> None:
        """Keep a prediction, as `Prediction.packed` packed it."""
        key = key_of(config, self._gpu, rank)
        if key is not None:
            self._disk.put(key, packed)

    def get_largest(self, config: RunConfig) -> dict[str, int] | None:
        """The largest values that fit, as `capacity.largest_that_fit` found them; None if nobody has looked."""
        key = self._key_of_largest(config)
        packed = self._disk.get(key) if key is not None else None
        if key is None or packed is None:
            return None
        try:
            return msgspec.json.decode(packed, type=dict[str, int])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._disk.drop(key)
            return None

    def put_largest(self, config: RunConfig, found: dict[str, int]) -> None:
        """Keep what the search for the largest values has found."""
        key = self._key_of_largest(config)
        if key is not None:
            self._disk.put(key, msgspec.json.encode(found))

    def _key_of_largest(self, config: RunConfig) -> str | None:
        key = key_of(config, self._gpu)
        return f"largest {key}" if key is not None else None


def _folder() -> Path | None:
    """`$XDG_CACHE_HOME/gpumem-tui/predictions`; None where there is no home."""
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    return folder / "predictions" if folder is not None else None


# --- keys ------------------------------------------------------------------------


def key_of(config: RunConfig, gpu: Gpu, rank: int | None = None) -> str | None:
    """Everything that decides a prediction, in one text; None: it cannot be told here."""
    pretrained = _config_json(config.model) if config.pretrained else ""
    if pretrained is None:
        return None
    return json.dumps(
        {
            "config": json.loads(memory_key(config)),
            "pretrained": pretrained,
            "gpu": dataclasses.asdict(dataclasses.replace(gpu, count=1)),
            "rank": [rank, ranks(config, gpu.count)],
            "allocator": [os.environ.get(name, "") for name in ALLOCATOR_SETTINGS],
        }
        | programs(),
        sort_keys=True,
    )


def programs() -> dict[str, Any]:
    """The versions of all code that a prediction runs."""
    return {"libraries": {name: _version(name) for name in LIBRARIES}, "code": _code()}


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
