"""A tensor of weights that is read in parts, wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bits import FORMATS, RUN, Bits, Format

CHUNK = RUN * 8192
"""Numbers read at a time: 4 MiB of 16-bit floats, which a processor's cache holds."""


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

    def chunks(self) -> Iterator[Bits]:
        """The weights from the beginning, flat, CHUNK at a time; a chunk is valid until the next is asked for."""
        ...

    def runs(self, indices: NDArray[np.int64]) -> Bits:
        """Some whole runs [len(indices), RUN] by their places, in ascending order."""
        ...


@dataclass(frozen=True, slots=True)
class Geometry:
    """A tensor as quantizers see it: rows of the last dimension.

    Attributes:
        rows: All dimensions but the last, multiplied.
        columns: The last dimension.
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
    return Geometry(math.prod(tensor.shape[:-1]), tensor.shape[-1])


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
