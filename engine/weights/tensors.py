"""A tensor of weights that is read in parts, wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bits import FORMATS, RUN, Bits, Format

CHUNK = RUN * 8192
"""Numbers read at a time: 4 MiB of 16-bit floats, which a processor's cache holds."""

GLIMPSED = 256
"""Runs that a glimpse of a tensor is made of."""


class WeightTensor(Protocol):
    """Weights of one parameter, none of them in memory."""

    @property
    def name(self) -> str:
        """The parameter's name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, of two dimensions or more."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype it is stored in, by safetensors' name."""
        ...

    @property
    def read_as(self) -> str:
        """The format its bits come in: one of bits.FORMATS."""
        ...

    @property
    def transposed(self) -> bool:
        """True if it is stored as inputs by outputs: quantizers get its transpose."""
        ...

    def chunks(self) -> Iterator[Bits]:
        """The weights as quantizers get them, flat, CHUNK at a time; a chunk is valid until the next is asked for."""
        ...

    def glimpse(self) -> Bits:
        """Some whole runs [n, RUN] from all over a tensor that has any, soon read."""
        ...

    def runs(self, indices: NDArray[np.int64]) -> Bits:
        """Some whole runs [len(indices), RUN] by their places, in ascending order."""
        ...


@dataclass(frozen=True, slots=True)
class Geometry:
    """A tensor as quantizers see it: a row for each output.

    Attributes:
        rows: All dimensions but the last, multiplied; if it is stored transposed, the last.
        columns: The other.
    """

    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def whole_runs(self) -> int:
        """Runs of RUN weights."""
        return self.numel // RUN


def geometry(tensor: WeightTensor) -> Geometry:
    """Rows and columns of a tensor."""
    rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    return Geometry(columns, rows) if tensor.transposed else Geometry(rows, columns)


def stored_transposed(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The matrices stored as inputs by outputs, as transformers' Conv1D has them (GPT-2).

    A bias is as long as there are outputs, so it says which dimension they are.
    Of a square matrix it does not: that is stored as the one is whose path is most alike.

    Args:
        shapes: Of all parameters, by name; a layer's are called `….weight` and `….bias`.
    """
    said: dict[str, bool] = {}
    square: list[str] = []
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('.weight')}.bias")
        if len(shape) != 2 or bias is None or len(bias) != 1 or bias[0] not in shape:
            continue
        if shape[0] == shape[1]:
            square.append(name)
        else:
            said[name] = bias[0] == shape[1]
    if any(said.values()):
        for name in square:
            said[name] = said[max(said, key=lambda other: _in_common(name, other))]
    return frozenset(name for name, transposed in said.items() if transposed)


def _in_common(one: str, other: str) -> int:
    """Number of modules that the paths of two parameters go through together."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def format_of(tensor: WeightTensor) -> Format:
    """The format its bits come in."""
    return FORMATS[tensor.read_as]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The weights of a model.

    Attributes:
        tensors: The matrices of weights, in the order they lie in.
        config: Content of its config.json; empty: it is not known.
        vectors: How many vectors there are besides: biases and norms, which nobody quantizes.
        left_out: Why others are not among them, by name: indices, which are no weights.
        random: Whether the weights are drawn.
    """

    tensors: tuple[WeightTensor, ...]
    config: Mapping[str, Any]
    vectors: int
    left_out: Mapping[str, str]
    random: bool = False
