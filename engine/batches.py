"""The rows a model is trained on: of a task's shapes, random or a file's, in endless micro-batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import packing
from .config import RunConfig, UserError, one_line
from .packing import TextRows
from .tasks import Row, Rows, Task

if TYPE_CHECKING:
    from .recipe import Recipe


@dataclass
class Batches:
    """Endless micro-batches.

    Attributes:
        rows: By the model's argument, [rows, ...] on the host.
        tokens: In each row; None: its rows are no tokens.
        lengths: Tokens of each row that are no padding: a batch is as long as its longest; empty: rows are full.
        one_row: Whether all rows of a batch become one.
        rank: Of a job; each has rows of its own.
        ranks: Of the job.
    """

    rows: Mapping[str, torch.Tensor]
    tokens: int | None
    batch_size: int
    device: torch.device
    lengths: Sequence[int] = ()
    one_row: bool = False
    start: int = 0
    rank: int = 0
    ranks: int = 1

    def next(self) -> dict[str, Any]:
        """The next [batch_size, ...] rows of this rank on the device, wrapping around."""
        count, first = len(next(iter(self.rows.values()))), self.start + self.rank * self.batch_size
        chosen = [(first + i) % count for i in range(self.batch_size)]
        self.start = (self.start + self.ranks * self.batch_size) % count
        longest = max(self.lengths[row] for row in chosen) if self.lengths else None
        parts = {name: rows[chosen] for name, rows in self.rows.items()}
        if longest is not None:
            parts = {name: rows[:, :longest].contiguous() for name, rows in parts.items()}
        if self.one_row:
            parts = {name: rows.reshape(1, -1) for name, rows in parts.items()}
        batch: dict[str, Any] = {name: rows.to(self.device) for name, rows in parts.items()}
        if "boxes" in batch:  # a detector is told of each image by itself
            told = {name: batch.pop(name).unbind() for name in ("class_labels", "boxes")}
            batch["labels"] = [dict(zip(told, one, strict=True)) for one in zip(*told.values(), strict=True)]
        return batch


def shapes_of(config: RunConfig, wanted: Rows, recipe: Recipe) -> TextRows:
    """A batch's rows that take no memory, for a prediction."""
    rows = {
        name: torch.zeros(1, dtype=_dtype(row, recipe.dtype)).expand(config.batch_size, *row.shape)
        for name, row in wanted.items()
    }
    return TextRows(rows) if recipe.packing == "off" else packing.shapes_of(recipe.packing, rows)


def random_rows(config: RunConfig, wanted: Rows, recipe: Recipe) -> TextRows:
    """The article's data: labels are drawn independently of inputs.

    Args:
        config: Says how many, and the seed.
        wanted: Their tensors.
        recipe: Says how they are filled; real numbers are as the weights, which is what models convert them to.
    """
    generator = torch.Generator().manual_seed(config.seed)

    def made(row: Row) -> torch.Tensor:
        shape = (config.rows, *row.shape)
        if row.high:
            return torch.randint(row.low, row.high, shape, generator=generator)
        return torch.rand(shape, generator=generator).to(recipe.dtype)

    rows = {name: made(row) for name, row in wanted.items()}
    if recipe.packing == "off":
        return TextRows(rows)
    return packing.of_random(recipe.packing, rows, config.batch_size, config.seed)


def bytes_of(config: RunConfig, wanted: Rows, dtype: torch.dtype) -> int:
    """Bytes that all rows take on the host."""
    return sum(config.rows * row.elements * _dtype(row, dtype).itemsize for row in wanted.values())


def _dtype(row: Row, dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if row.high else dtype


def file_rows(config: RunConfig, task: Task) -> TextRows:
    """A text or JSONL file, tokenized: cut into rows of seq_len tokens, or each of its texts by itself.

    Raises:
        UserError: No such file, a line that is not JSON with a text, no
            tokenizer, or fewer tokens than one row.
    """
    from transformers import AutoTokenizer

    if task.name != "causal-lm":
        raise UserError(f"--data is text for language models; {task.name} is trained on random rows")
    path = Path(str(config.data))
    texts = list(_texts(path))
    name = config.model
    if not config.pretrained:
        name = config.architecture.tokenizer if config.architecture else ""
        if not name:
            raise UserError(f"--data needs a tokenizer, and the profile {config.model} has none; use --model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--data needs the tokenizer of {name}: {one_line(error)}") from None
    tokenized = [tokenizer(text)["input_ids"] for text in texts]
    if config.text("packing") != "off":
        found = packing.of_texts(config.text("packing"), tokenized, config.seq_len)
        if not len(found.rows["input_ids"]):
            raise UserError(f"--data {path}: there is no text in it")
        return found
    tokens = [token for text in tokenized for token in text]
    rows = len(tokens) // config.seq_len
    if not rows:
        raise UserError(f"--data {path}: {len(tokens)} tokens are less than one row of seq_len={config.seq_len}")
    ids = torch.tensor(tokens[: rows * config.seq_len]).view(rows, config.seq_len)
    return TextRows({"input_ids": ids, "labels": ids})


def _texts(path: Path) -> Iterator[str]:
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
            raise UserError(f"--data {path}: no file")
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f'--data {path}:{number}: not a JSON object with a "text"') from None
