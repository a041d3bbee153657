"""Rows of texts of several lengths: each filled up and masked, or one behind the other with positions of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

IGNORED = -100
"""The label of a token that is not trained on."""

Tensors = dict[str, torch.Tensor]


class TextRows(NamedTuple):
    """Rows ready to be batched.

    Attributes:
        rows: By the model's argument, [rows, seq_len].
        lengths: Tokens of each row that are not padding, if rows are cut to the longest of their batch; else empty.
    """

    rows: Tensors
    lengths: Sequence[int] = ()


def shapes_of(kind: str, rows: Tensors) -> TextRows:
    """Rows for a prediction: full ones, since some batch has a text as long as a row may be."""
    ids = rows["input_ids"]
    named = {"padded": "attention_mask", "packed": "position_ids"}[kind]
    return TextRows(rows | {named: torch.ones_like(ids[:1, :1]).expand_as(ids)}, _all(ids) if kind == "padded" else ())


def _all(ids: torch.Tensor) -> list[int]:
    return [ids.shape[1]] * len(ids)


def of_random(kind: str, rows: Tensors, batch_size: int, seed: int) -> TextRows:
    """Random rows as texts: up to a row long if padded, one in each batch of all of it; up to half a row if packed."""
    ids = rows["input_ids"]
    generator = torch.Generator().manual_seed(seed)
    count, seq_len = ids.shape

    def length(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    if kind == "padded":
        lengths = [seq_len if row % batch_size == 0 else length(max(1, seq_len // 8), seq_len) for row in range(count)]
        texts: Iterable[list[int]] = ([n] for n in lengths)
    else:
        texts = (_cut(seq_len, lambda: length(max(1, seq_len // 8), max(1, seq_len // 2))) for _ in range(count))
    return _arranged(kind, ids, rows["labels"], texts)


def _cut(seq_len: int, length: Callable[[], int]) -> list[int]:
    """Lengths of texts that fill a row."""
    found: list[int] = []
    while (left := seq_len - sum(found)) > 0:
        found.append(min(left, length()))
    return found


def of_texts(kind: str, texts: Iterable[Sequence[int]], seq_len: int) -> TextRows:
    """Texts as rows: one each and cut off at seq_len, or packed, the longest first into the first row with room.

    Args:
        kind: `padded` or `packed`.
        texts: Token ids.
        seq_len: Of a row.
    """
    cut = [list(text[:seq_len]) for text in texts if len(text)]
    bins: list[list[list[int]]] = []
    if kind == "padded":
        bins = [[text] for text in cut]
    else:
        room: list[int] = []
        for text in sorted(cut, key=len, reverse=True):
            at = next((i for i, free in enumerate(room) if free >= len(text)), len(bins))
            if at == len(bins):
                bins.append([])
                room.append(seq_len)
            bins[at].append(text)
            room[at] -= len(text)
    ids = torch.zeros(len(bins), seq_len, dtype=torch.int64)
    for row, inside in zip(ids, bins, strict=True):
        together = [token for text in inside for token in text]
        row[: len(together)] = torch.tensor(together)
    return _arranged(kind, ids, ids, ([len(text) for text in inside] for inside in bins))


def _arranged(kind: str, ids: torch.Tensor, labels: torch.Tensor, texts: Iterable[list[int]]) -> TextRows:
    """Rows whose texts have these lengths; behind them a row is empty."""
    ids, labels, lengths = ids.clone(), labels.clone(), []
    other = torch.zeros_like(ids)  # the mask, or the positions
    for row, inside in enumerate(texts):
        used = sum(inside)
        ids[row, used:], labels[row, used:] = 0, IGNORED
        start = 0
        for length in (*inside, ids.shape[1] - used) if kind == "packed" else inside:
            labels[row, start : start + 1] = IGNORED  # nothing before it foretells a text's first token
            other[row, start : start + length] = torch.arange(length) if kind == "packed" else 1
            start += length
        lengths.append(used)
    if kind == "padded":
        return TextRows({"input_ids": ids, "labels": labels, "attention_mask": other}, lengths)
    return TextRows({"input_ids": ids, "labels": labels, "position_ids": other})
