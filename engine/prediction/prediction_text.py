"""A prediction as text, within the terminal's width. Loads no torch."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from .. import techniques
from ..categories import CATEGORIES, Category
from ..config import RunConfig
from ..events import AllocatorPool
from ..ledger import Ledger
from ..pool_bytes import PoolBytes, by_stream
from ..techniques import describe
from .outcome import EXPANDABLE, RESERVED_SPREAD_BYTES, Prediction, Verdict

MIB, GIB = 1 << 20, 1 << 30


def heading(prediction: Prediction) -> str:
    """The heading: the run and the GPU it is predicted for."""
    config = prediction.config
    of_their_own = config.architecture is None and not config.pretrained
    return f"{config.model if of_their_own else describe(config)} on {prediction.gpu}, predicted"


def text(prediction: Prediction) -> str:
    """Composition by moment, where the peak is, whether it fits, and what was taken for granted."""
    name, unit = ("GiB", GIB) if prediction.peak_bytes >= GIB else ("MiB", MIB)

    def show(size: int) -> str:
        return f"{size / unit:.3f}"

    document = prediction.document
    loaded, after, peak = document.loaded, document.after_first_step, document.peak
    assert loaded is not None and peak is not None
    titled = {"loaded": loaded, "after first step": after, "peak": peak}
    moments = {title: moment for title, moment in titled.items() if moment is not None}
    lines = [f"{name:<16}" + "".join(f"{title:>18}" for title in moments)]
    for category in Category:
        sizes = [moment.by_category[category.key] for moment in moments.values()]
        if any(sizes):
            info = CATEGORIES[category]
            lines.append(f"{info.letter} {info.title:<14}" + "".join(f"{show(size):>18}" for size in sizes))
    lines.append(f"{'allocated':<16}" + "".join(f"{show(m.allocated_bytes):>18}" for m in moments.values()))
    where = f", {peak.module}" if peak.module else ""
    lines += ["", f"The peak is in step {peak.step}, {peak.phase}{where}."]
    if prediction.managed_bytes:
        lines.append(f"Paged optimizer state, in CUDA managed memory besides: {show(prediction.managed_bytes)}.")
    if prediction.pinned_bytes:
        lines.append(f"On the host, page-locked and in no figure above: {show(prediction.pinned_bytes)}.")
    lines += filled([verdict(prediction), *_streams(prediction), *_unsure(prediction), *cautions(prediction.config)])
    length = prediction.config.row_tokens
    if 0 < prediction.max_positions < length:
        lines.append(f"{length} tokens in a row: the model was made for {prediction.max_positions}.")
    return "\n".join([*lines, *_growth(prediction), *filled(list(prediction.notes))])


def of_ranks(kinds: Sequence[Prediction]) -> list[str]:
    """Sentences about a job's ranks; none about a rank alone.

    Args:
        kinds: A prediction for each group of ranks that hold the same.
    """
    first, lowest = (pick(kinds, key=lambda one: one.peak_bytes) for pick in (max, min))
    if first.ranks == 1:
        return []
    same = "all hold the same"
    if first.peak_bytes > lowest.peak_bytes:
        same = f"it is the highest; the lowest is rank {lowest.rank} with {_gib(lowest.peak_bytes)}"
    lines = [f"This is rank {first.rank} of {first.ranks}; {same}."]
    if first.fits:  # else what would be reserved cannot be
        lines.append(
            f"Ranks that do the same have differed in what they reserve by up to {_gib(RESERVED_SPREAD_BYTES)}."
        )
    return lines


def verdict(prediction: Prediction) -> str:
    """The verdict, fits or not, by which figure, and what is left or missing of what torch can have."""
    if not prediction.fits:
        return f"It does not fit: {why_not(prediction)}."
    room, allocated = _room(prediction), _gib(prediction.safe_bound_bytes)
    if prediction.verdict is Verdict.FITS:
        reserved = _gib(prediction.reserved_bound_bytes)
        spare = _gib(prediction.available_bytes - prediction.reserved_bound_bytes)
        return (
            f"It fits with {spare} to spare: up to {reserved} are reserved, at most {allocated} of them allocated "
            f"({_gib(prediction.peak_bytes)} expected), of {room}."
        )
    gaps, hint = _gaps(prediction)
    return (
        f"It fits tightly, with nothing to spare: up to {allocated} are allocated at once, of {room}; {gaps}, "
        f"so that the allocator gives cached blocks back and asks again, which takes time{hint}."
    )


def why_not(prediction: Prediction) -> str:
    """The reason why a run does not fit, by which figure."""
    room, allocated = _room(prediction), _gib(prediction.safe_bound_bytes)
    if prediction.available_bytes <= 0:
        return room
    if prediction.verdict is Verdict.TOO_LARGE:
        return f"up to {allocated} are allocated at once, {_gib(-prediction.margin_bytes)} more than {room}"
    gaps, hint = _gaps(prediction)
    return f"up to {allocated} are allocated at once, of {room}, but {gaps}{hint}"


def _gaps(prediction: Prediction) -> tuple[str, str]:
    """The bytes that would be reserved, and with expandable segments."""
    hint, expandable = "", prediction.expandable_bytes
    if expandable is not None:
        needed = prediction.bound_bytes(expandable)
        fits = "which fits" if needed <= prediction.available_bytes else "still too much"
        hint = f"; with {EXPANDABLE} it would be {_gib(needed)}, {fits}"
    return f"with the gaps between blocks {_gib(prediction.reserved_bound_bytes)} would be reserved", hint


def _room(prediction: Prediction) -> str:
    """The bytes that torch can have on the GPU, if any, and what has been taken off."""
    whole = prediction.available_bytes + prediction.outside_torch_bytes
    outside = "CUDA and NCCL, estimated" if prediction.ranks > 1 else "CUDA's context"
    taken = f"{_gib(prediction.outside_torch_bytes)} for {outside}"
    if prediction.available_bytes <= 0:
        return f"of the {_gib(whole)} on {prediction.gpu} nothing is left for torch after {taken}"
    return (
        f"the {_gib(prediction.available_bytes)} that torch can have on {prediction.gpu} ({_gib(whole)} less {taken})"
    )


def _growth(prediction: Prediction) -> list[str]:
    """The growth of the KV cache with the tokens generated, and why there is more of it at the peak."""
    config = prediction.config
    if not config.generates:
        return []
    lines, most = ["", f"{'tokens in a row':<18}{'KV cache MiB':>14}{'peak MiB':>14}"], 0
    for trace in prediction.run.traces():
        if trace.step:
            ledger, length = Ledger(trace), config.seq_len + trace.step - 1
            held = ledger.end.get(Category.KV_CACHE, 0)
            most = max(most, held)
            lines.append(f"{length:<18}{held / MIB:>14.1f}{ledger.peak.bytes / MIB:>14.1f}")
    peak = prediction.document.peak
    if peak is not None and (more := peak.by_category[Category.KV_CACHE.key] - most) > 0:
        said = f"while a layer adds a token, what it had is there as well: {more / MIB:.1f} MiB more at the peak."
        lines += filled([f"This is the KV cache as each token leaves it; {said}"])
    return lines


def _streams(prediction: Prediction) -> list[str]:
    """Cached bytes of each stream, where there is more than one."""
    peak = prediction.document.peak
    streams = by_stream(
        PoolBytes(
            AllocatorPool(held.stream, held.size_class, held.private),
            held.reserved_bytes,
            held.allocated_bytes,
            held.slack_bytes,
        )
        for held in (peak.pools if peak is not None else ())
    )
    if len(streams) < 2:
        return []
    cached = ", ".join(f"{stream.name} {_gib(stream.unused_bytes)}" for stream in streams)
    return [f"Reserved and not allocated at the peak, each for its own stream alone: {cached}."]


def _unsure(prediction: Prediction) -> list[str]:
    if not prediction.unsure_bytes:
        return []
    size = f"up to {prediction.unsure_bytes / MIB:.1f} MiB more at the peak, in the bound alone."
    if prediction.config["parallel"] == "ddp":
        return [f"In the second step NCCL may hold DDP's first bucket until the next all-reduce, on some ranks: {size}"]
    return [f"Workspaces of cuDNN and cuFFT depend on their versions: {size}"]


def cautions(config: RunConfig) -> list[str]:
    """Surprises in a configuration's memory, in sentences."""
    return [f"{line[0].upper()}{line[1:]}." for line in techniques.cautions(config)]


def filled(sentences: list[str]) -> list[str]:
    """Within the terminal's width."""
    columns = shutil.get_terminal_size().columns - 1
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, columns, break_on_hyphens=False, break_long_words=False)
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
