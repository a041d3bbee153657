"""What a quantization scheme is. One file a family in `engine/weights/schemes/`, exporting SCHEMES."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch

    from .survey import Part, Survey

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some runs of a tensor and what is known of all of it, as torch tensors.

    Attributes:
        values: float32 [n, w].
        starts: int64 [n]: place of each run's first weight in the flat tensor.
        columns: Of the tensor.
        bounds: float32 [1, 2]: the tensor's smallest and largest weight, 0 between them.
        row_bounds: float32 [rows, 2]: the same of every row.
        absmax_mean: Mean over blocks of 64 weights of their largest magnitude.
        ordered: float32, ascending: weights that stand for all of the tensor alike.
        shared: What schemes of one family work out once for all of them.
    """

    values: torch.Tensor
    starts: torch.Tensor
    columns: int
    bounds: torch.Tensor
    row_bounds: torch.Tensor
    absmax_mean: float
    ordered: torch.Tensor
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[Piece], T]) -> T:
        """What another scheme has made of this piece under that name, or else make it."""
        if name not in self.shared:
            self.shared[name] = make(self)
        found: T = self.shared[name]
        return found

    def by_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The values cut where rows may end [m, g], and the bounds of the row of each [m, 2]."""
        import torch

        width = math.gcd(self.values.shape[1], self.columns)
        parts = self.values.reshape(-1, width)
        firsts = self.starts[:, None] + torch.arange(0, self.values.shape[1], width)
        return parts, self.row_bounds[torch.div(firsts.reshape(-1), self.columns, rounding_mode="floor")]


def piece_of(survey: Survey, part: Part, ordered: torch.Tensor) -> Piece:
    """One part of a tensor for the schemes."""
    import torch

    rows = torch.stack([torch.from_numpy(survey.row_low), torch.from_numpy(survey.row_high)], 1)
    return Piece(
        torch.from_numpy(part.values), torch.from_numpy(part.starts), survey.geometry.columns,
        torch.tensor([[survey.low, survey.high]]), rows, survey.absmax_mean, ordered,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantized:
    """What has become of a piece.

    Attributes:
        codes: uint8, flat: what each weight is stored as: one of the scheme's.
        restored: float32 [n, w]: the weights as they are computed with.
        scales: The constants as they should be and as they are stored, if those are quantized too.
    """

    codes: torch.Tensor
    restored: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None = None


def _suits_all(_rows: int, _columns: int) -> str | None:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Scheme:
    """A way to store weights in fewer bits.

    Attributes:
        key: By which it is named everywhere.
        title: For people, short.
        order: Schemes are listed by it.
        code_bits: Of one weight's code.
        codes: Those there are, in the order of the levels they stand for.
        formula: How a weight becomes its code.
        explanation: What it does and why, in at most 60 words with the formula.
        source: Where it is described.
        package: Whose implementation is measured.
        quantize: A piece of a tensor.
        storage_bytes: From rows and columns: what a tensor takes, with every constant.
        unsuited: From rows and columns: why a tensor cannot be stored so, or None.
        setting: What `quantization` is set to for a run to store its weights so; empty: no run can.
        error_follows: What a weight's error is in proportion to: the weights around it, the largest of its
            row, or nothing, since every step of the tensor is the same.
        usual: Whether it is measured where nobody names schemes.
    """

    key: str
    title: str
    order: int
    code_bits: int
    codes: Sequence[int]
    formula: str
    explanation: str
    source: str
    package: str
    quantize: Callable[[Piece], Quantized]
    storage_bytes: Callable[[int, int], int]
    unsuited: Callable[[int, int], str | None] = _suits_all
    setting: tuple[tuple[str, str | bool], ...] = ()
    error_follows: Literal["weights", "row", "nothing"] = "weights"
    usual: bool = True

    @property
    def unavailable(self) -> str | None:
        """Why it cannot be measured here (one line), or None."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        return f"the package {self.package} is not installed: pip install 'gpumem-tui[weights]'"
