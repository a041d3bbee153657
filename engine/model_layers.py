"""The repeated layers of a model."""

from __future__ import annotations

from typing import Any


def decoder_layers(model: Any) -> list[Any]:
    """The modules of the list that has as many as the model's configuration says; empty: it has none."""
    from torch.nn import ModuleList

    count = int(getattr(getattr(model, "config", None), "num_hidden_layers", 0) or 0)
    found = (m for m in model.modules() if isinstance(m, ModuleList) and len(m) == count)
    return list(next(found, []))
