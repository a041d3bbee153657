"""Weights to measure: drawn as trained ones can be, and a file of them measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpumem_tui.engine.weights.checkpoint import open_checkpoint
from gpumem_tui.engine.weights.lens import reports
from gpumem_tui.engine.weights.report import TensorReport
from gpumem_tui.engine.weights.schemes import registry

HERE = {key: scheme for key, scheme in registry().items() if not scheme.unavailable}
Draw = Callable[[], torch.Tensor]


def normal(rows: int = 1024, columns: int = 2048) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def with_outliers(rows: int = 1024, columns: int = 2048) -> torch.Tensor:
    """Ten in a million are thirty times as large."""
    torch.manual_seed(0)
    weights = torch.randn(rows, columns)
    weights.view(-1)[torch.rand(weights.numel()) < 1e-5] *= 30
    return weights


def heavy_tailed() -> torch.Tensor:
    """Rows and columns of unlike size, and tails; rows that end within a run."""
    torch.manual_seed(0)
    sizes = torch.exp(torch.randn(2048, 1) / 2) * torch.exp(torch.randn(1, 896) / 2)
    return torch.distributions.StudentT(8.0).sample((2048, 896)) * sizes


def unlike_rows() -> torch.Tensor:
    """Normal weights, rows of unlike size: a few of them hold most of what lies beyond the quantiles."""
    torch.manual_seed(0)
    return torch.randn(4096, 1024) * torch.exp(torch.randn(4096, 1) / 3)


def measured(folder: Path, weights: torch.Tensor, *keys: str, exact: bool = True) -> TensorReport:
    save_file({"w.weight": weights}, folder / "model.safetensors")
    schemes = [HERE[key] for key in keys or HERE if key in HERE]
    (found,) = reports(open_checkpoint(str(folder)).tensors, schemes, exact)
    return found
