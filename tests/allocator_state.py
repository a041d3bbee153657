"""What a caching allocator has: parts of its snapshot, pools of what is cached, and what is held outside of it."""

from __future__ import annotations

from typing import Any

import torch

from gpumem_tui.engine.out_of_memory.report import Pool


def pool(cached: int, largest: int, stream: int = 0, name: str = "large") -> Pool:
    return Pool(stream=stream, pool=name, cached_bytes=cached, largest_free_block_bytes=largest)


def snapshot_block(address: int, size: int, state: str = "active_allocated") -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": size, "state": state}


def snapshot_segment(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    total = sum(block["size"] for block in blocks)
    return {"stream": 0, "segment_type": "large", "blocks": list(blocks), "total_size": total, "device": 0, **more}


def outside_bytes() -> int:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
