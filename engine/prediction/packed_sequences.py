"""Packed sequences, whose sizes are the sum of their rows' lengths: all rows are taken to be as long as the longest.

`_pack_padded_sequence`, its backward and `_pad_packed_sequence` of
`aten/src/ATen/native/PackedSequence.cpp` read lengths from memory, of which a
fake tensor has none. A packed sequence keeps at most what it does with whole rows;
what rows of unlike lengths may take beside it for a moment is in the bound.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..config import UserError
from .assumptions import place_of_frame

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda

aten = torch.ops.aten
Tensor = torch.Tensor


def register(library: torch.library.Library, tracker: FakeCuda) -> None:
    """Take these instead of the functions that read lengths."""
    library.impl("_pack_padded_sequence_backward", _backward, "AutogradCPU")
    library.impl("_pad_packed_sequence", partial(_padded, tracker), "AutogradCPU")


def kernels() -> dict[Any, Any]:
    """The operator that packs."""
    return {aten._pack_padded_sequence.default: _packed}


def sizes_of(batch_sizes: Any) -> list[int]:
    """Rows that a packed sequence has at each time step.

    Raises:
        UserError: It was packed in another way.
    """
    known = getattr(batch_sizes, "constant", None)
    if known is None:
        place = place_of_frame(sys._getframe(1))
        raise UserError(f"{place}: how many rows a packed sequence has at a time step depends on data")
    with torch._C._DisableTorchDispatch():
        sizes: list[int] = known.tolist()
    return sizes


def _packed(tracker: FakeCuda, _func: Any, args: Any, _kwargs: Any) -> Any:
    """Blocks of rows that end together are put one behind the other; those that are not contiguous are copied first."""
    x, _lengths, batch_first = args
    tracker.assume("rows that are packed are taken to be as long as the longest")
    with tracker:
        x = x.transpose(0, 1) if batch_first else x
        steps, rows = x.shape[:2]
        if x.is_contiguous():
            tracker.may_take(x.nbytes, tracker.address(x))  # blocks of fewer rows are not
        blocks = [x.contiguous().view(-1, *x.shape[2:])]
        return torch.cat(blocks), _known([rows] * steps)


def _backward(grad: Tensor, input_size: list[int], _batch_sizes: Tensor, batch_first: bool) -> Tensor:
    rows, steps, *others = input_size if batch_first else (input_size[1], input_size[0], *input_size[2:])
    of_input = grad.new_zeros([steps, rows, *others])
    return of_input.transpose(0, 1) if batch_first else of_input


def _padded(
    tracker: FakeCuda, data: Tensor, batch_sizes: Tensor, batch_first: bool, value: float, total_length: int
) -> Any:
    sizes = sizes_of(batch_sizes)
    steps, rows = len(sizes), sizes[0]
    out = data.new_full([max(total_length, steps), rows, *data.shape[1:]], value)
    out[:steps, :rows].copy_(data.narrow(0, 0, steps * rows).view(steps, rows, *data.shape[1:]))
    if out.requires_grad:
        # each block's copy gives out's gradient anew, and one of all data that is added to the others'
        most = 2 * out.nbytes + 2 * data.nbytes
        out.register_hook(lambda _: tracker.may_take(most))
    return out.transpose(0, 1) if batch_first else out, _known([steps] * rows)


def _known(numbers: list[int]) -> Any:
    """A tensor of the host that is read from."""
    with torch._C._DisableTorchDispatch():
        constant = torch.tensor(numbers)
    made: Any = torch.empty(len(numbers), dtype=torch.int64)
    made.constant = constant
    return made
