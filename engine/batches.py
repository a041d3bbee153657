"""The rows a model is trained on: of a task's shapes, random or a file's, in endless micro-batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import RunConfig, UserError, one_line
from .tasks import Row, Rows, Task


@dataclass
class Batches:
    """Endless micro-batches.

    Attributes:
        rows: By the model's argument, [rows, ...] on the host.
        tokens: In each row; None: its rows are no tokens.
        rank: Of a job; each has rows of its own.
        ranks: Of the job.
    """

    rows: Mapping[str, torch.Tensor]
    tokens: int | None
    batch_size: int
    device: torch.device
    start: int = 0
    rank: int = 0
    ranks: int = 1

    def next(self) -> dict[str, Any]:
        """The next [batch_size, ...] rows of this rank on the device, wrapping around."""
        count, first = len(next(iter(self.rows.values()))), self.start + self.rank * self.batch_size
        chosen = [(first + i) % count for i in range(self.batch_size)]
        self.start = (self.start + self.ranks * self.batch_size) % count
        batch: dict[str, Any] = {name: rows[chosen].to(self.device) for name, rows in self.rows.items()}
        if "boxes" in batch:  # a detector is told of each image by itself
            parts = {name: batch.pop(name).unbind() for name in ("class_labels", "boxes")}
            batch["labels"] = [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]
        return batch


def shapes_of(config: RunConfig, wanted: Rows, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch's rows that take no memory, for a prediction."""
    return {
        name: torch.zeros(1, dtype=_dtype(row, dtype)).expand(config.batch_size, *row.shape)
        for name, row in wanted.items()
    }


def random_rows(config: RunConfig, wanted: Rows, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The article's data: labels are drawn independently of inputs.

    Args:
        config: Says how many, and the seed.
        wanted: Their tensors.
        dtype: Of real numbers: as the weights are, which is what models convert them to.
    """
    generator = torch.Generator().manual_seed(config.seed)

    def made(row: Row) -> torch.Tensor:
        shape = (config.rows, *row.shape)
        if row.high:
            return torch.randint(row.low, row.high, shape, generator=generator)
        return torch.rand(shape, generator=generator).to(dtype)

    return {name: made(row) for name, row in wanted.items()}


def bytes_of(config: RunConfig, wanted: Rows, dtype: torch.dtype) -> int:
    """Bytes that all rows take on the host."""
    return sum(config.rows * row.elements * _dtype(row, dtype).itemsize for row in wanted.values())


def _dtype(row: Row, dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if row.high else dtype


def file_rows(config: RunConfig, task: Task) -> dict[str, torch.Tensor]:
    """A text or JSONL file, tokenized and cut into rows of seq_len tokens.

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
    tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
    rows = len(tokens) // config.seq_len
    if not rows:
        raise UserError(f"--data {path}: {len(tokens)} tokens are less than one row of seq_len={config.seq_len}")
    ids = torch.tensor(tokens[: rows * config.seq_len]).view(rows, config.seq_len)
    return {"input_ids": ids, "labels": ids}


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
