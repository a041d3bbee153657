"""From what was seen of a refusal to the report: folded by the ledger, judged, and put beside the run's history."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from ..allocator_settings import MIN_BLOCK_BYTES
from ..categories import Category
from ..events import Gauge, Made
from ..ledger import Ledger, LiveBlock
from ..prediction.caching_allocator import rounded_bytes
from ..run import Run
from .growth import Rise
from .refusal import Refusal, Refused
from .report import LargestTensor, OutOfMemoryReport, Pool
from .verdict import Circumstances, judge

LARGEST = 10


def report_of(
    refusal: Refusal, run: Run, gauge: Gauge, rise: Rise | None = None, error: str = ""
) -> OutOfMemoryReport | None:
    """The report of a refusal that ended a step.

    Args:
        refusal: As it was seen.
        run: Whose latest trace is that step's, as it was then.
        gauge: A reading of its device.
        rise: Of the bytes alive at the same point of every step.
        error: What the exception says.

    Returns:
        None: that trace is not there.
    """
    trace = run.latest
    if trace is None or not trace.is_aborted or trace.step != refusal.step:
        return None
    ledger, refused = Ledger(trace), refusal.refused
    if refusal.traced and not refused.operator:
        refused = _described(refused, refusal, ledger)
    around = Circumstances(
        total_bytes=gauge.device_total_bytes,
        outside_bytes=refused.outside_bytes,
        others_bytes=_outside(refused, gauge)[1],
        rise=rise,
        grows=what_grows(run) if rise is not None else "",
        step=refusal.step,
        came=_came(run, ledger, refusal.traced),
    )
    report = _judged(refused, refusal, ledger, gauge, around)
    return msgspec.structs.replace(report, rank=run.id.rank, device=run.id.device, error=error)


def _judged(
    refused: Refused, refusal: Refusal, ledger: Ledger, gauge: Gauge, around: Circumstances
) -> OutOfMemoryReport:
    """The report, but for the rank and the exception."""
    verdict, reason = judge(refused, around)
    return OutOfMemoryReport(
        asked_bytes=refused.asked_bytes,
        verdict=verdict,
        reason=reason,
        phase=refusal.phase.title,
        step=refusal.step,
        allocated_bytes=refusal.allocated_bytes,
        by_category={category.key: size for category, size in ledger.end.items() if size},
        total_bytes=gauge.device_total_bytes,
        module=refusal.module,
        operator=refused.operator,
        dtype=refused.dtype,
        shape=refused.shape,
        micro_batch=refusal.micro_batch,
        traced=refusal.traced,
        largest=tuple(map(_tensor, ledger.largest(len(ledger.trace.events) - 1, LARGEST))),
        cached_bytes=max(0, refused.reserved_bytes - refusal.allocated_bytes),
        free_bytes=refused.free_bytes,
        largest_free_block_bytes=_largest(refused.pools),
        pools=refused.pools,
        limit_bytes=refused.limit_bytes,
        outside_torch_bytes=refused.outside_bytes,
        context_bytes=_outside(refused, gauge)[0],
        nccl_bytes=gauge.nccl_bytes,
        others_bytes=around.others_bytes,
        expandable_segments=refused.expandable_segments,
        growth_bytes=around.rise.bytes if around.rise is not None else 0,
        growth_owner=around.grows,
    )


def what_grows(run: Run) -> str:
    """The owner of most of what the last traced step ended with and not the one before it; empty: not known."""
    complete = [trace for trace in run.traces() if trace.is_complete and trace.step > 1][-2:]
    if len(complete) < 2:
        return ""
    before, after = (_by_owner(Ledger(trace)) for trace in complete)
    grown = {owner: size - before.get(owner, 0) for owner, size in after.items()}
    owner = max(grown, key=lambda owner: grown[owner], default=None)
    if owner is None or grown[owner] <= 0:
        return ""
    category, name = owner
    title = category.info.title
    if category is Category.HELD_BY_SCRIPT:
        return f"{title}{_made_in(Ledger(complete[-1]))}"
    return f"{title}: {name}" if name else title


def _made_in(ledger: Ledger) -> str:
    """The module that made most of what the script holds of a step; empty: the script owned it in other ways then."""
    blocks = ledger.blocks
    held = (blocks["category"] == Category.HELD_BY_SCRIPT) & (blocks["born"] >= 0)
    rows = np.flatnonzero(held & (blocks["died"] >= len(ledger.trace.events)))
    if not len(rows):
        return ""
    block = ledger.describe(int(rows[np.argmax(blocks["bytes"][rows])]))
    return f", made in {block.phase.title}" + (f" by {block.module}" if block.module else "")


def _by_owner(ledger: Ledger) -> dict[tuple[Category, str], int]:
    event = len(ledger.trace.events) - 1
    return {
        (category, name): size
        for category in Category
        if ledger.end[category] and category is not Category.SLACK
        for name, size in ledger.by_name(event, category).items()
    }


def _came(run: Run, ledger: Ledger, traced: bool) -> dict[Category, int]:
    """Bytes alive since before this step began that the step before did not begin with.

    Of a step that was not traced, only what an optimizer keeps is surely as old.
    """
    step = ledger.trace.step
    before = next((trace for trace in run.traces() if trace.step == step - 1 and trace.is_complete), None)
    if before is None or step < 2:
        return {}
    began = Ledger(before).at(-1)
    old = ledger.blocks[(ledger.blocks["born"] < 0) & (ledger.blocks["died"] >= len(ledger.trace.events))]
    sizes = np.bincount(old["category"], weights=old["bytes"], minlength=len(Category)).astype(np.int64)
    kept = list(Category) if traced else [Category.OPTIMIZER_STATE]
    return {
        category: size
        for category in kept
        if category is not Category.SLACK and (size := int(sizes[category]) - began[category]) > 0
    }


def _described(refused: Refused, refusal: Refusal, ledger: Ledger) -> Refused:
    """The refusal with operator, dtype and shape, if a step whose operators were watched did the same there."""
    trace = ledger.trace
    made = trace.made
    if not len(made) or not len(trace.marks):
        return refused
    here = trace.marks[-1]
    alike = np.ones(len(made), bool)
    for column in ("phase", "micro_batch", "module"):
        alike &= made[column] == here[column]
    # The allocator tells of a refusal what it would have handed out, of an allocation what was asked for.
    asked = rounded_bytes(refused.asked_bytes)
    alike &= -(-made["bytes"] // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES == asked
    born = ledger.blocks[ledger.blocks["born"] >= 0]
    marks = trace.marks[born["born_mark"]]
    so_far = -(-born["bytes"] // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES == asked
    for column in ("phase", "micro_batch", "module"):
        so_far &= marks[column] == here[column]
    nth = int(np.count_nonzero(so_far))
    candidates = made[alike]["made"]
    if nth >= len(candidates) or candidates[nth] < 0:
        return refused
    found: Made = trace.descriptions[candidates[nth]]
    return dataclasses.replace(refused, operator=found.operator, dtype=found.dtype, shape=found.shape)


def _outside(refused: Refused, gauge: Gauge) -> tuple[int | None, int | None]:
    """Bytes outside torch: this process's, and others'; None: NVML does not tell."""
    own = gauge.beyond_torch_bytes
    if own is None or not refused.outside_bytes:
        return None, None
    # What NVML calls used holds the driver's own reserve as well, which CUDA counts to nobody.
    own = max(0, min(own, refused.outside_bytes))
    return own, max(0, refused.outside_bytes - own - gauge.managed_bytes)


def _largest(pools: tuple[Pool, ...]) -> int:
    return max((pool.largest_free_block_bytes for pool in pools), default=0)


def _tensor(block: LiveBlock) -> LargestTensor:
    shape = f"[{', '.join(map(str, block.shape))}]" if block.dtype else ""
    return LargestTensor(
        bytes=block.bytes,
        category=block.category.key,
        owner=block.name if block.name != block.module else "",
        module=block.module,
        description=" ".join(part for part in (block.operator, shape, block.dtype) if part),
    )
