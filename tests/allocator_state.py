"""What a caching allocator has: parts of its snapshot and trace, pools of what is cached, and what is outside."""

from __future__ import annotations

from typing import Any

import torch

from gpumem_tui.engine.out_of_memory.report import Pool
from gpumem_tui.engine.tracing.trace_entries import Entries, read


def pool(cached: int, largest: int, stream: int = 0, name: str = "large") -> Pool:
    return Pool(stream=stream, pool=name, cached_bytes=cached, largest_free_block_bytes=largest)


def snapshot_block(address: int, size: int, state: str = "active_allocated") -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": size, "state": state}


def snapshot_segment(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    total = sum(block["size"] for block in blocks)
    return {"stream": 0, "segment_type": "large", "blocks": list(blocks), "total_size": total, "device": 0, **more}


def trace_entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": stream, "time_us": 0, "user_metadata": "1"}


def entries(*rows: tuple[str, int, int] | tuple[str, int, int, int]) -> Entries:
    return read([trace_entry(*row) for row in rows])


def outside_bytes() -> int:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
