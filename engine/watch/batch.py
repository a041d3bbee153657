"""A batch, as a model is called with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..tracing import owners


class Batch(NamedTuple):
    """Shape of a batch.

    Attributes:
        rows: In it; 0: it is not known.
        seq_len: Tokens in one row; None: its rows are no tokens.
    """

    rows: int = 0
    seq_len: int | None = None

    @property
    def tokens(self) -> int | None:
        """Number of tokens in all rows."""
        return None if self.seq_len is None else self.rows * self.seq_len


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The tensors a model is called with, by name; those of positional arguments are `input`, `input.1`."""
    positional = {"input" if i == 0 else f"input.{i}": argument for i, argument in enumerate(args)}
    return list(owners.tensors_in({**positional, **kwargs}))


def batch_of(named: list[tuple[str, torch.Tensor]]) -> Batch:
    """The shape, from the token ids, the embeddings made of them, or whatever comes first."""
    by_name = dict(reversed(named))
    ids = by_name.get("input_ids")
    if ids is None:
        ids = by_name.get("inputs_embeds")
    if ids is None:
        ids = next((t for _, t in named if t.dim() == 2 and not t.is_floating_point() and not t.is_complex()), None)
    if ids is not None and ids.dim() >= 2:
        return Batch(int(ids.shape[0]), int(ids.shape[1]))
    shaped = next((tensor for _, tensor in named if tensor.dim()), None)
    return Batch(int(shaped.shape[0])) if shaped is not None else Batch()


def rows_of(named: list[tuple[str, torch.Tensor]], seq_len: int | None) -> dict[str, int]:
    """The settings that show in tensors beside the token ids: the side of images, the length of what a decoder says."""
    by_name = dict(named)
    pixels, labels = by_name.get("pixel_values"), by_name.get("labels")
    found = {}
    if pixels is not None and pixels.dim() == 4 and pixels.shape[-1] == pixels.shape[-2]:
        found["image_size"] = int(pixels.shape[-1])
    if labels is not None and labels.dim() == 2 and seq_len not in (None, labels.shape[1]):
        found["target_len"] = int(labels.shape[1])
    return found


def packing_of(named: list[tuple[str, torch.Tensor]]) -> str | None:
    """The value of `packing` that a batch shows; None: its rows are full. Waits for the device, allocates nothing."""
    by_name = {name: tensor for name, tensor in named if type(tensor) is torch.Tensor and tensor.dim() == 2}
    positions, mask = (by_name.get(name) for name in ("position_ids", "attention_mask"))
    if positions is not None and positions.dtype in WHOLE:
        starts = int((positions.detach().cpu().numpy() == 0).sum())
        if starts > len(positions):
            return "packed"
    if mask is not None and mask.dtype in WHOLE and not mask.detach().cpu().numpy().all():
        return "padded"
    return None


WHOLE = (torch.int64, torch.int32, torch.bool)
