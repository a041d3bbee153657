"""The runs of a tensor that a scheme gets to quantize."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .sample import Floats, Part
from .survey import Survey

T = TypeVar("T")

QUANTILES = 256
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
        quantiles: float32 [256], ascending: of the tensor's weights, each in the middle of 1/256 of them.
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
    quantiles: torch.Tensor
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


class Pieces:
    """The pieces of a surveyed tensor."""

    def __init__(self, survey: Survey) -> None:
        middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
        self.survey = survey
        self.quantiles = torch.from_numpy(survey.values.quantiles(middles))
        self.bounds = torch.tensor([[survey.low, survey.high]])
        self.row_absmax = torch.from_numpy(survey.row_absmax)[:, None]

    def of(self, part: Part) -> Piece:
        """The runs of one part."""
        return self._piece(part.values, part.stands_for, part.starts)

    def of_values(self) -> Piece:
        """The values that stand for all, each a run of its own: for schemes that need no places."""
        values = self.survey.values
        return self._piece(values.values[:, None], values.counts, np.zeros(0, np.int64))

    def _piece(self, values: Floats, stands_for: NDArray[np.float64], starts: NDArray[np.int64]) -> Piece:
        tensor = torch.from_numpy(values)
        near = tensor.abs().amax(1) <= TYPICAL * self.survey.typical
        return Piece(
            values=tensor,
            stands_for=torch.from_numpy(stands_for),
            starts=torch.from_numpy(starts),
            columns=self.survey.geometry.columns,
            bounds=self.bounds,
            row_absmax=self.row_absmax,
            typical=near.nonzero()[:TYPICAL_RUNS, 0],
            absmax_mean=self.survey.absmax_mean,
            quantiles=self.quantiles,
        )
