"""A model's safetensors: which tensors there are, and parts of them, never all of them."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import UserError, one_line
from .bits import FORMATS, RUN, Bits
from .tensors import CHUNK, GLIMPSED, ModelWeights, stored_transposed

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000
"""Bytes; what the format's own reader accepts."""

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Weights within a safetensors file.

    Attributes:
        path: The file.
        offset: Where in it they begin, in bytes.
        transposed: Whether they are stored as inputs by outputs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    transposed: bool = False

    @property
    def read_as(self) -> str:
        """Its own format if that is one whose bits are ordered, or else F32."""
        return self.dtype if self.dtype in FORMATS else "F32"

    def chunks(self) -> Iterator[Bits]:
        """Through one buffer that every chunk is read into; one that is transposed is read whole."""
        if self.transposed:
            flat = self._transpose()
            yield from (flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK))
            return
        size, numel = FLOAT_BYTES[self.dtype], math.prod(self.shape)
        buffer = np.empty(min(CHUNK, numel) * size, np.uint8)
        with self._open() as file:
            for start in range(0, numel, CHUNK):
                part = buffer[: min(CHUNK, numel - start) * size]
                self._read(file.fileno(), part, start * size)
                yield self._bits(part)

    def glimpse(self) -> Bits:
        """From places drawn at random, the same ones each time: none that recur with the columns."""
        places = np.random.default_rng(0).integers(0, math.prod(self.shape) // RUN, GLIMPSED)
        return self.runs(np.sort(places))

    def runs(self, indices: NDArray[np.int64]) -> Bits:
        """Each read where it lies."""
        if self.transposed:
            flat = self._transpose()
            return flat[: len(flat) // RUN * RUN].reshape(-1, RUN)[indices]
        size = FLOAT_BYTES[self.dtype] * RUN
        with self._open() as file, self._reading():
            descriptor = file.fileno()
            raw = bytearray().join(
                [os.pread(descriptor, size, self.offset + place * size) for place in indices.tolist()]
            )
        if len(raw) != size * len(indices):
            raise self._ended()
        return self._bits(np.frombuffer(raw, np.uint8)).reshape(-1, RUN)  # of a bytearray: can be written to

    def _transpose(self) -> Bits:
        raw = np.empty(math.prod(self.shape) * FLOAT_BYTES[self.dtype], np.uint8)
        with self._open() as file:
            self._read(file.fileno(), raw, 0)
        return np.ascontiguousarray(self._bits(raw).reshape(self.shape).T).reshape(-1)

    def _open(self) -> Any:
        with self._reading():
            return self.path.open("rb", buffering=0)

    def _read(self, descriptor: int, into: NDArray[np.uint8], at: int) -> None:
        done = 0
        while done < len(into):
            with self._reading():
                count = os.preadv(descriptor, [into[done:].data], self.offset + at + done)
            if not count:
                raise self._ended()
            done += count

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: {self.name} cannot be read: {error.strerror}") from None

    def _ended(self) -> UserError:
        return UserError(f"{self.path}: damaged: the file ends within {self.name}")

    def _bits(self, raw: NDArray[np.uint8]) -> Bits:
        if self.dtype in FORMATS:
            return raw.view(FORMATS[self.dtype].unsigned)
        if self.dtype == "F64":
            with np.errstate(over="ignore"):  # beyond float32 is an infinity, and refused as one
                return raw.view("<f8").astype("<f4").view("<u4")
        import torch

        kind = torch.float8_e4m3fn if self.dtype == "F8_E4M3" else torch.float8_e5m2
        return torch.from_numpy(raw).view(kind).float().numpy().view("<u4")


def open_checkpoint(where: str, download: bool = True) -> ModelWeights:
    """Read the headers of a model's files.

    Args:
        where: A .safetensors file, a folder of them, or a model on the hub.
        download: Whether a model of the hub that is not on this machine may be fetched: gigabytes.

    Raises:
        UserError: There is none, a file is damaged, or a tensor holds integers that should be weights.
    """
    path = Path(where).expanduser()
    if path.suffix == ".safetensors" or path.is_file():
        files, folder = [path], path.parent
    else:
        folder = path if path.is_dir() else _from_hub(where, download)
        files = _files(folder)
    found = [tensor for file in files for tensor in _header(file)]
    left_out: dict[str, str] = {}
    tensors: list[FileTensor] = []
    for tensor in found:
        if tensor.dtype in FLOAT_BYTES:
            tensors.append(tensor)
        elif tensor.dtype in ("I64", "BOOL") and not tensor.name.endswith("weight"):
            left_out[tensor.name] = f"holds integers ({tensor.dtype}): indices, no weights"
        else:
            raise UserError(f"{tensor.path}: {_not_weights(tensor)}")
    transposed = stored_transposed({tensor.name: tensor.shape for tensor in tensors})
    matrices = [
        replace(tensor, transposed=tensor.name in transposed)
        for tensor in tensors
        if len(tensor.shape) >= 2 and min(tensor.shape) > 0
    ]
    if not matrices:
        reason = "; ".join(f"{name} {why}" for name, why in left_out.items()) or "no tensor has two dimensions"
        raise UserError(f"{where}: there are no weights to quantize: {reason}")
    return ModelWeights(tuple(matrices), _config(folder), len(tensors) - len(matrices), left_out)


def _not_weights(tensor: FileTensor) -> str:
    if tensor.dtype in INTEGERS:
        return f"{tensor.name} holds integers ({tensor.dtype}): only floats can be measured; is it quantized already?"
    return f"{tensor.name} is of the type {tensor.dtype}, which is not known here"


def _files(folder: Path) -> list[Path]:
    listing = folder / INDEX
    if listing.is_file():
        try:
            names = sorted(set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{listing}: damaged: it does not say which files the weights are in") from None
        return [folder / Path(name).name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: there is no .safetensors file in it")
    return files


def _from_hub(name: str, download: bool) -> Path:
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # those that follow say why it is not there
        folder = Path(snapshot_download(name, local_files_only=True))
        if all(file.is_file() for file in _files(folder)):
            return folder
    if not download:
        raise UserError(f"{name} is not on this machine: gpumem-tui weights --model {name} downloads it")
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"])
        )
    except Exception as error:  # its errors share no class: not found, offline, refused
        raise UserError(f"--model {name}: {one_line(error)}") from None


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _header(path: Path) -> list[FileTensor]:
    """The tensors of one file, in the order they lie in.

    Raises:
        UserError: It is not a safetensors file, or a tensor does not lie within it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(LARGEST_HEADER, size - 8):
                raise UserError(f"{path}: damaged, or no safetensors file: its header is longer than the file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged, or no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged, or no safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length, size) for name, entry in header.items()]
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> FileTensor:
    try:
        dtype, shape, (begin, end) = (
            str(entry["dtype"]),
            tuple(map(index, entry["shape"])),
            map(index, entry["data_offsets"]),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged: the header's entry of {name} is not complete") from None
    if not 0 <= begin <= end <= size - data:
        raise UserError(f"{path}: damaged: {name} lies beyond the end of the file")
    if dtype in FLOAT_BYTES and (
        any(size < 0 for size in shape) or math.prod(shape) * FLOAT_BYTES[dtype] != end - begin
    ):
        raise UserError(f"{path}: damaged: {name} has {end - begin} bytes, and not those of {dtype}{list(shape)}")
    return FileTensor(name, shape, dtype, path, data + begin)
