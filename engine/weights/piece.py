"""The runs of a tensor that a scheme gets to quantize."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .survey import Part, Survey

T = TypeVar("T")

TYPICAL, TYPICAL_RUNS = 1.25, 128
"""Times the median of the runs' largest weights; how many runs of a piece say where a scheme's levels lie."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some runs of a tensor and what is known of all of it, as torch tensors.

    Attributes:
        values: float32 [n, w].
        starts: int64 [n]: place of each run's first weight in the flat tensor.
        columns: Of the tensor.
        bounds: float32 [1, 2]: the tensor's smallest and largest weight, 0 between them.
        row_bounds: float32 [rows, 2]: the same of every row.
        typical: Places of some runs whose largest weight is not far from that of most.
        absmax_mean: Mean over blocks of 64 weights of their largest magnitude.
        ordered: float32, ascending: weights that stand for all of the tensor alike.
        shared: What schemes of one family work out once for all of them.
    """

    values: torch.Tensor
    starts: torch.Tensor
    columns: int
    bounds: torch.Tensor
    row_bounds: torch.Tensor
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

    def by_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The values cut where rows may end [m, g], and the bounds of the row of each [m, 2]."""
        width = math.gcd(self.values.shape[1], self.columns)
        parts = self.values.reshape(-1, width)
        firsts = self.starts[:, None] + torch.arange(0, self.values.shape[1], width)
        return parts, self.row_bounds[torch.div(firsts.reshape(-1), self.columns, rounding_mode="floor")]


def piece_of(survey: Survey, part: Part, ordered: torch.Tensor) -> Piece:
    """One part of a tensor for the schemes."""
    values = torch.from_numpy(part.values)
    near = values.abs().amax(1) <= TYPICAL * survey.typical
    rows = torch.stack([torch.from_numpy(survey.row_low), torch.from_numpy(survey.row_high)], 1)
    return Piece(
        values=values,
        starts=torch.from_numpy(part.starts),
        columns=survey.geometry.columns,
        bounds=torch.tensor([[survey.low, survey.high]]),
        row_bounds=rows,
        typical=near.nonzero()[:TYPICAL_RUNS, 0],
        absmax_mean=survey.absmax_mean,
        ordered=ordered,
    )
