"""A step as PyTorch's memory viewer reads it (https://pytorch.org/memory_viz).

The viewer takes the snapshot of `torch.cuda.memory._snapshot()` as JSON. It
replays `device_traces` and draws the categories in colours of their own; who
owns a block, its layer, operator and shape are in `user_metadata` and, for
older viewers and `python -m torch.cuda._memory_viz`, in its frames.

A snapshot says `size` for what was asked for. What the allocator rounded up is
an allocation of its own behind it, so that the curve is the allocator's count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..categories import Category
from ..events import AllocatorPool, Phase
from ..ledger import Ledger, LiveBlock
from .blocks import Actions, BlockTexts, chunks
from .exported_run import ExportedRun, Format, Sink
from .number_text import digits, page, unpadded

SEGMENT = 2 << 20
"""The CUDA allocator takes memory in multiples of this."""

_NO_POOL = AllocatorPool(0, "large")

_PLACE = b'"addr":%,"size":%,"stream":%,"time_us":%'
_ALLOC = b',{"action":"alloc",' + _PLACE + b","
_FREE = b',{"action":"free_requested",' + _PLACE + b'},{"action":"free_completed",' + _PLACE + b"}"
"""A free is requested and completed at once."""
_DETAILS = b"\1"
"""The place of a block's details, which are not of one width; no text in JSON has this byte."""
_BLOCK = b'{"address":%d,"size":%d,"requested_size":%d,"state":"active_allocated",'
_GAP = b'{"address":%d,"size":%d,"requested_size":0,"state":"inactive","frames":[]}'


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """One device a run."""
    sink.write(b'{"device_traces":[\n')
    segments: list[bytes] = []
    for device, run in enumerate(runs):
        details = BlockTexts(run.ledger, _details)
        segments += _segments(run.ledger, details, device)
        sink.write(b",\n[\n" if device else b"[\n")
        for piece, events in _entries(run.ledger, details):
            sink.write(piece, events)
        sink.write(b"\n]")
    sink.write(b'\n],"segments":[\n' + b",\n".join(segments))
    about = [{"device": device, "run": run.name, "step": run.trace.step} for device, run in enumerate(runs)]
    sink.write(b'\n],"allocator_settings":{},"external_annotations":' + json.dumps(about).encode() + b"}\n")


FORMAT = Format("memory-viz", ".memory-viz.json", "PyTorch's memory viewer, with categories and owners", write)


def _entries(ledger: Ledger, details: BlockTexts) -> Iterator[tuple[bytes, int]]:
    """The trace, piece by piece, with how many of the step's events each has."""
    times = ledger.trace.events["time_us"]
    began = int(times[0]) if len(times) else 0
    # The viewer fails where no entry at all is of this category.
    yield b'{"action":"snapshot","addr":0,"size":0,"stream":0,"time_us":%d,"category":"unknown"}' % began, 0
    for part, events in chunks(ledger):
        time = np.full(len(part.event), began)
        in_step = part.event >= 0
        time[in_step] = times[part.event[in_step]]
        yield _part(ledger, details, part, time), events


def _part(ledger: Ledger, details: BlockTexts, part: Actions, time: npt.NDArray[np.int64]) -> bytes:
    """The text of entries in order: each block's and, behind it, its slack's."""
    blocks = ledger.blocks[part.row]
    end = blocks["address"] + blocks["bytes"].astype("u8")
    stream = np.array([pool.stream for pool in (*ledger.trace.pools, _NO_POOL)])[blocks["pool"]]
    block = [digits(column) for column in (blocks["address"], blocks["bytes"], stream, time)]
    slack = [digits(end), digits(blocks["slack"]), *block[2:]]
    of_slack = _ALLOC + _text(Category.SLACK, {"category": Category.SLACK.key}, ())
    kinds = (
        (_FREE, block * 2),
        (_ALLOC + _DETAILS, block),
        (_FREE * 2, [*block * 2, *slack * 2]),
        (_ALLOC + _DETAILS + of_slack, [*block, *slack]),
    )
    kind = 2 * (blocks["slack"] > 0) + part.is_alloc
    rows = [np.flatnonzero(kind == number) for number in range(len(kinds))]
    pages = [page(entry, *(c[at] for c in columns)) for (entry, columns), at in zip(kinds, rows, strict=True)]
    whole = np.zeros((len(blocks), max(written.shape[1] for written in pages)), np.uint8)
    for at, written in zip(rows, pages, strict=True):
        whole[at, : written.shape[1]] = written
    return _with_details(unpadded(whole), details.of(part.row[part.is_alloc]))


def _with_details(entries: bytes, found: Sequence[bytes]) -> bytes:
    """Entries with each block's details in their place."""
    pieces = entries.split(_DETAILS)
    told = [b""] * (2 * len(found) + 1)
    told[::2], told[1::2] = pieces, found
    return b"".join(told)


def _details(block: LiveBlock, layer: str) -> bytes:
    """Details of an entry's block that follow the numbers."""
    shape = str(list(block.shape)) if block.shape else ""
    known = {
        "category": block.category.key,
        "owner": block.name,
        "layer": layer,
        "operator": block.operator,
        "dtype": block.dtype,
        "shape": shape,
        "phase": "" if block.phase is Phase.IDLE else block.phase.title,
        "module": block.module,
    }
    tensor = " ".join(filter(None, (block.operator, block.dtype, shape))) or "tensor"
    frames = ((block.name or "model", tensor), (layer or "model", "layer"))
    return _text(block.category, {key: text for key, text in known.items() if text}, frames)


def _text(category: Category, known: dict[str, str], frames: tuple[tuple[str, str], ...]) -> bytes:
    """The rest of an entry; frames are innermost first."""
    listed = [
        {"filename": where, "line": 0, "name": what} for where, what in (*frames, (category.info.legend, "bytes"))
    ]
    rest = {"category": category.info.legend, "user_metadata": known, "frames": listed}
    return json.dumps(rest, separators=(",", ":")).encode()[1:] + b"\n"


def _segments(ledger: Ledger, details: BlockTexts, device: int) -> list[bytes]:
    """The end of the step: what is alive, within the memory that the step has touched.

    A step does not say where the allocator's segments begin. Every block lies
    in one, so they are the blocks' ranges, widened to what CUDA hands out.
    """
    blocks = ledger.blocks
    return [
        text
        for number in np.unique(blocks["pool"]).tolist()
        for text in _segments_of_pool(ledger, details, device, np.flatnonzero(blocks["pool"] == number))
    ]


def _segments_of_pool(ledger: Ledger, details: BlockTexts, device: int, rows: npt.NDArray[np.int64]) -> list[bytes]:
    """Segments of the blocks of one pool, by their rows; there is at least one."""
    blocks = ledger.blocks[rows]
    address = blocks["address"].astype(np.int64)
    low = address // SEGMENT * SEGMENT
    size, slack = blocks["bytes"], blocks["slack"]
    high = -(-(address + np.maximum(size + slack, 1)) // SEGMENT) * SEGMENT
    order = np.argsort(low, kind="stable")
    low, high = low[order], np.maximum.accumulate(high[order])
    begins = np.flatnonzero(np.concatenate([[True], low[1:] > high[:-1]]))
    ends = high[np.append(begins[1:], len(high)) - 1]
    alive = np.flatnonzero(blocks["died"] >= len(ledger.trace.events))
    alive = alive[np.argsort(address[alive], kind="stable")]
    cut = np.searchsorted(address[alive], np.append(low[begins], ends[-1]))
    pool = (*ledger.trace.pools, _NO_POOL)[blocks["pool"][0]]
    return [
        _segment(ledger, details, device, pool, (int(begin), int(end)), rows[alive[first:last]])
        for begin, end, first, last in zip(low[begins], ends, cut[:-1], cut[1:], strict=True)
    ]


def _segment(
    ledger: Ledger,
    details: BlockTexts,
    device: int,
    pool: AllocatorPool,
    between: tuple[int, int],
    alive: npt.NDArray[np.int64],
) -> bytes:
    """One segment with its blocks and the gaps between them."""
    begin, end = between
    listed, at = [], begin
    rows = ledger.blocks[alive][["address", "bytes", "slack"]].tolist()
    for (address, size, slack), detail in zip(rows, details.of(alive), strict=True):
        if address > at:
            listed.append(_GAP % (at, address - at))
        listed.append(_BLOCK % (address, size + slack, size) + detail)
        at = address + size + slack
    if at < end:
        listed.append(_GAP % (at, end - at))
    requested, held = sum(row[1] for row in rows), sum(row[1] + row[2] for row in rows)
    segment = {
        "device": device,
        "address": begin,
        "total_size": end - begin,
        "allocated_size": held,
        "active_size": held,
        "requested_size": requested,
        "stream": pool.stream,
        "segment_type": pool.size_class,
        "segment_pool_id": pool.private,
        "is_expandable": False,
        "frames": [],
    }
    return json.dumps(segment, separators=(",", ":")).encode()[:-1] + b',"blocks":[' + b",\n".join(listed) + b"]}"
