"""The runs of a tensor that a scheme gets to quantize."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .survey import Part, Survey

T = TypeVar("T")

TYPICAL, TYPICAL_RUNS = 1.25, 128
"""Times the median of the runs' largest weights; how many runs of a piece say where a scheme's levels lie."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some runs of a tensor and what is known of all of it, as torch tensors.

    Attributes:
        values: float32 [n, w].
        stands_for: float64 [n]: runs of the tensor that each of these stands for.
        starts: int64 [n]: place of each run's first weight in the flat tensor.
        columns: Of the tensor.
        bounds: float32 [1, 2]: the tensor's smallest and largest weight, 0 between them.
        row_absmax: float32 [rows, 1]: the largest magnitude of every row.
        typical: Places of some runs whose largest weight is not far from that of most.
        absmax_mean: Mean over blocks of 64 weights of their largest magnitude.
        ordered: float32, ascending: weights that stand for all of the tensor alike.
        shared: What schemes of one family work out once for all of them.
    """

    values: torch.Tensor
    stands_for: torch.Tensor
    starts: torch.Tensor
    columns: int
    bounds: torch.Tensor
    row_absmax: torch.Tensor
    typical: torch.Tensor
    absmax_mean: float
    ordered: torch.Tensor
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[Piece], T]) -> T:
        """The value that another scheme has made of this piece under that name, or else a new one."""
        if name not in self.shared:
            self.shared[name] = make(self)
        found: T = self.shared[name]
        return found

    @property
    def count(self) -> float:
        """Weights of the tensor that these stand for."""
        return float(self.stands_for.sum()) * self.values.shape[1]

    def sum_of_squares(self, numbers: torch.Tensor) -> float:
        """Sum of the squares of what belongs to these runs and all that they stand for: as many numbers to each run."""
        of_runs = torch.linalg.vector_norm(numbers.reshape(len(self.stands_for), -1), dim=1).double()
        return float(self.stands_for @ of_runs.square())

    @property
    def squares(self) -> float:
        """Sum of the squares of the weights."""
        return self.once("squares", lambda piece: piece.sum_of_squares(piece.values))

    @property
    def row_squares(self) -> float:
        """Sum over the weights of the square of their row's largest magnitude."""

        def found(piece: Piece) -> float:
            parts, absmax = piece.by_row()
            return parts.shape[1] * piece.sum_of_squares(absmax)

        return self.once("row squares", found)

    def histogram(self, places: torch.Tensor, bins: int) -> NDArray[np.float64]:
        """Weights of the tensor in each bin.

        Args:
            places: Integers [n, w] or flat: the bin of each weight.
            bins: That there are.
        """
        each = self.once("each", lambda piece: piece.stands_for.repeat_interleave(piece.values.shape[1]))
        found: NDArray[np.float64] = torch.bincount(places.reshape(-1), each, minlength=bins).numpy()
        return found

    def by_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The values cut where rows may end [m, g], and the largest magnitude of the row of each [m, 1]."""
        width = math.gcd(self.values.shape[1], self.columns)
        parts = self.values.reshape(-1, width)
        firsts = self.starts[:, None] + torch.arange(0, self.values.shape[1], width)
        return parts, self.row_absmax[torch.div(firsts.reshape(-1), self.columns, rounding_mode="floor")]


def piece_of(survey: Survey, part: Part, ordered: torch.Tensor) -> Piece:
    """One part of a tensor for the schemes."""
    values = torch.from_numpy(part.values)
    near = values.abs().amax(1) <= TYPICAL * survey.typical
    return Piece(
        values=values,
        stands_for=torch.from_numpy(part.stands_for),
        starts=torch.from_numpy(part.starts),
        columns=survey.geometry.columns,
        bounds=torch.tensor([[survey.low, survey.high]]),
        row_absmax=torch.from_numpy(survey.row_absmax)[:, None],
        typical=near.nonzero()[:TYPICAL_RUNS, 0],
        absmax_mean=survey.absmax_mean,
        ordered=ordered,
    )
