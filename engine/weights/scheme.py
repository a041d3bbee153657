"""The form of a quantization scheme. One file a family in `engine/weights/schemes/`, exporting SCHEMES."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..missing_package import not_installed

if TYPE_CHECKING:
    import torch

    from .piece import Piece


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized piece.

    Attributes:
        codes: uint8, flat: what each weight is stored as: one of the scheme's.
        restored: float32 [n, w]: the weights as they are computed with.
        scales: The constants as they should be and as they are stored, if those are quantized too.
        ascending: float32 [n, w]: the restored weights, mirrored in blocks whose lowest code is the highest level.
    """

    codes: torch.Tensor
    restored: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    ascending: torch.Tensor | None = None


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
        elementwise: Whether levels are the whole tensor's: the code of a weight depends on its value alone.
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
    elementwise: bool = False
    usual: bool = True

    @property
    def unavailable(self) -> str | None:
        """The reason why it cannot be measured here (one line), or None."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        return not_installed(self.package, "weights")
