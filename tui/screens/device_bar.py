"""The device on one axis from 0 to its capacity: this process by category, then everybody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ...engine.categories import Category
from ...engine.events import CacheState, Gauge, StepTrace
from ...engine.ledger import Bytes
from ...engine.pool_bytes import by_stream
from ..draw import Row
from ..palette import Palette
from ..state import ViewState
from ..units import shorten
from ..widgets.bars import Part, stacked

LEAST_GAPS = 0.01
"""Share of the device from which gaps between blocks are worth a row."""

SHOWN_FROM_BYTES = 1 << 20
"""The least of what nobody accounts for that is shown; less is a driver's breathing."""


class Share(NamedTuple):
    """One figure under the device bar; None: not known."""

    letter: str
    title: str
    bytes: int | None


def shares(gauge: Gauge, allocated: int, on_gpu: bool) -> list[Share]:
    """Shares of the device's memory besides the categories, in the order of the bar.

    Args:
        gauge: The reading.
        allocated: What the categories add up to; on a GPU, what the allocator
            has reserved beyond it is cached.
        on_gpu: A CPU has no context and, without a memory limit, no caching
            allocator; there, the rest of the process takes that place.
    """
    process, reserved = gauge.process_bytes, gauge.reserved_bytes
    found: list[Share] = []
    if on_gpu or reserved is not None:
        found.append(Share("c", "cached", None if reserved is None else max(0, reserved - allocated)))
    if on_gpu:
        found.append(Share("x", "context", gauge.context_bytes))
        if gauge.nccl_bytes is not None:
            found.append(Share("n", "NCCL", gauge.nccl_bytes))
        if (gauge.unaccounted_bytes or 0) >= SHOWN_FROM_BYTES:
            found.append(Share("u", "unaccounted", gauge.unaccounted_bytes))
        if gauge.managed_bytes:
            found.append(Share("m", "managed", gauge.managed_bytes))
    elif reserved is None:
        found.append(Share("x", "rest of process", None if process is None else max(0, process - allocated)))
    others = gauge.others_bytes
    used = gauge.device_used_bytes
    if others is None and used is not None:
        # Containers hide which process holds what: context and others in one.
        others = max(0, used - max(reserved or 0, allocated))
        found.append(Share("o", "context and others", others))
    else:
        found.append(Share("o", "others", others))
    total = gauge.device_total_bytes
    free = None if used is None else max(0, total - max(used, allocated))
    # One request can have less than all that is free: what lies in gaps is of no use to it.
    edge = Share("", "free", free) if gauge.cache is None else Share("", "usable", gauge.usable_bytes)
    return [*found, edge]


def device_rows(
    state: ViewState, palette: Palette, width: int, expandable: Callable[[StepTrace], int | None] = lambda _: None
) -> list[Row]:
    """Name and totals; the bar; its figures; the gaps in it, where they cost something; a bar of the host's.

    Args:
        state: What is shown.
        palette: Colours.
        width: Of the terminal.
        expandable: The most that would be reserved for a step with expandable segments; None: nobody predicts.
    """
    environment, gauge = state.environment, state.gauge
    if environment is None or gauge is None:
        text = "The engine is starting." if environment is None else f"{environment.device}  {environment.device_name}"
        rows = [Row().add(f" {text}", palette.dim), Row(), Row()]
        rows += _by_stream(state, palette, width)
        return rows + _on_host(state, state.run.pinned_bytes, palette, width)  # of a prediction nothing is read
    unit = state.unit
    sizes = state.latest if state.current else None
    allocated = sum(sizes.values()) if sizes is not None else gauge.allocated_bytes
    # The reading may be of another instant of the step than the trace's end: all figures are to be of one.
    gauge = replace(gauge, allocated_bytes=allocated)
    rest = shares(gauge, allocated, environment.on_gpu)
    used = unit.show(gauge.device_used_bytes)
    figures = f"{used} of {unit.full(gauge.device_total_bytes)} used"
    if not (state.live or state.current) and gauge.step:  # what is listed below is of a step before
        figures += f" in step {gauge.step}, {gauge.phase.title}"
    title = Row().add(f" {environment.device} ", palette.bold)
    title.add(shorten(environment.device_name, width - title.width - len(figures) - 3), palette.dim)
    title.right(figures, width - 1)
    inside = _inside(state, sizes, allocated, palette)
    parts = inside + [Part(s.letter, s.bytes, palette.device[s.letter]) for s in rest if s.letter and s.bytes]
    bar_row = Row().add(" ").extend(stacked(parts, gauge.device_total_bytes, width - 2, palette))
    rows = [title, bar_row, _figures(state, palette, allocated, rest, width)]
    if gauge.cache is not None and gauge.cache.gaps_bytes > LEAST_GAPS * gauge.device_total_bytes:
        rows.append(_gaps(state, gauge.cache, palette, width, expandable))
    return rows + _by_stream(state, palette, width) + _on_host(state, gauge.pinned_bytes, palette, width)


def _on_host(state: ViewState, pinned: int, palette: Palette, width: int) -> list[Row]:
    """The host's page-locked memory, on an axis of its own from 0 to all that the machine has; no row for next to none.

    Whose machine a prediction speaks of is not known: it has no axis.
    """
    if pinned < SHOWN_FROM_BYTES:
        return []
    row = Row().add(" host ", palette.dim).add(f"{state.unit.show(pinned):>12}")
    total = state.environment.host_bytes if state.environment is not None else 0
    if not total:
        return [row.add(f" {state.unit.name} page-locked", palette.dim)]
    row.add(f" of {state.unit.full(total)} page-locked ", palette.dim)
    part = Part("h", pinned, palette.device["h"])
    return [row.extend(stacked([part], total, width - row.width - 1, palette))]


def _gaps(
    state: ViewState,
    cache: CacheState,
    palette: Palette,
    width: int,
    expandable: Callable[[StepTrace], int | None],
) -> Row:
    """Fragmentation at the peak of the latest traced step, and what expandable segments would give back of it."""
    unit, complete = state.unit, state.complete
    row = Row().add(" in gaps at the peak ", palette.dim).add(unit.show(cache.gaps_bytes), palette.busy)
    row.add(f" of {unit.show(cache.reserved_bytes)} reserved, largest piece ", palette.dim)
    row.add(unit.show(cache.largest_free_block_bytes))
    known = state.config is not None and state.config.options.get("allocator") == "expandable-segments"
    reserved = expandable(complete.trace) if complete is not None and not known else None
    if reserved is not None:
        text = f"  expandable segments: ~{unit.full(reserved - cache.reserved_bytes)}"
        row.add(text if row.width + len(text) < width else "", palette.accent)
    return row


def _by_stream(state: ViewState, palette: Palette, width: int) -> list[Row]:
    """Cached bytes of each stream at the latest complete step's peak; no row where there is one stream only.

    The allocator gives what is freed to its own stream, so none of them has use of another's.
    """
    streams = by_stream(state.complete.pools_at_peak) if state.complete is not None else []
    if len(streams) < 2:
        return []
    row = Row().add(" cached by stream at the peak", palette.dim)
    for stream in streams:
        part = Row().add(f"  {stream.name} ", palette.dim).add(state.unit.show(stream.unused_bytes))
        part.add(f" of {state.unit.show(stream.reserved_bytes)}", palette.dim)
        if row.width + part.width < width:
            row.extend(part)
    return [row]


def _inside(state: ViewState, sizes: Bytes | None, allocated: int, palette: Palette) -> list[Part]:
    """This process's tensors by category; undivided while no step is being traced."""
    if sizes is None:
        return [Part("=", allocated, palette.paint[Category.SLACK])]
    return [Part(c.info.letter, size, palette.paint[c]) for c, size in sizes.items() if size]


def _figures(state: ViewState, palette: Palette, allocated: int, rest: list[Share], width: int) -> Row:
    """The bar in figures: how much, how far the edge is, and then the rest."""
    unit = state.unit
    on_gpu = state.environment is not None and state.environment.on_gpu
    row = Row().add(" allocated " if on_gpu else " tensors ", palette.dim).add(f"{unit.show(allocated):>7}")
    for share in (rest[-1], *rest[:-1]):
        mark = Row().add("  ")
        if share.letter:
            mark.add(share.letter, palette.device[share.letter]).add(" ")
        mark.add(f"{share.title} ", palette.dim).add(f"{unit.show(share.bytes):>6}")
        if row.width + mark.width < width:
            row.extend(mark)
    return row
