"""bitsandbytes' block-wise 8-bit quantization on a CPU, by one thread at a time."""

from __future__ import annotations

import threading
from typing import Any

import torch

_one_at_a_time = threading.Lock()


def quantize_blockwise(values: torch.Tensor, code: torch.Tensor | None, blocksize: int) -> tuple[torch.Tensor, Any]:
    """`bitsandbytes.functional.quantize_blockwise` by one thread at a time: several were seen to get wrong codes."""
    from bitsandbytes import functional

    with _one_at_a_time:
        codes, state = functional.quantize_blockwise(values, code=code, blocksize=blocksize)
    return codes, state
