"""The part that a training script imports: `from gpumem_tui.watch import watch, MemoryCallback`.

    with watch(model, optimizer):
        ...                                     any PyTorch loop

    Trainer(..., callbacks=[MemoryCallback()])  transformers, TRL

Then `gpumem-tui attach` in another terminal. The packaging maps this folder to
`gpumem_tui.watch`; the code is in `gpumem_tui.engine.watch`.
"""

from __future__ import annotations

from typing import Any

from gpumem_tui.engine import nccl
from gpumem_tui.engine.watch.watcher import watch

__all__ = ["MemoryCallback", "watch"]

nccl.observe()  # a script imports this before it joins the other ranks, and watches its model after that


def __getattr__(name: str) -> Any:
    """`MemoryCallback` loads transformers, which a plain loop can do without."""
    if name == "MemoryCallback":
        from gpumem_tui.engine.watch.callback import MemoryCallback

        return MemoryCallback
    raise AttributeError(name)
