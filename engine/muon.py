"""Muon for the hidden matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """PyTorch's Muon beside its AdamW, stepped as one.

    Muon takes matrices only, and its authors leave embeddings and head to AdamW. Its
    updates are scaled to AdamW's size, so that one learning rate does for both.

    Args:
        parameters: To be trained.
        lr: The learning rate.
        apart: `id` of the matrices that AdamW gets: of embeddings and head.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, apart: Collection[int] = ()) -> None:
        matrices = [p for p in parameters if p.dim() == 2 and id(p) not in apart]
        chosen = set(map(id, matrices))
        others = [p for p in parameters if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, foreach=True))
        super().__init__(parameters, {"lr": lr})

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """The state of both optimizers: each keeps that of its own parameters in it."""
        return self._state

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        self._state = state
        for part in self.parts:
            part.state = state  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both."""
        for part in self.parts:
            part.step()
