"""`gpumem-tui estimate`: a run's memory before it is run, on a GPU that need not be there."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...engine import techniques
from ...engine.config import RunConfig
from ...engine.events import CATEGORIES, Category
from ...engine.prediction.gpu_here import gpu_here
from ...engine.prediction.gpus import Gpu, gpu, understand
from ...engine.prediction.known import predicted
from ...engine.prediction.outcome import EXPANDABLE, Prediction, Verdict
from ...engine.prediction.search import largest_that_fit
from ...engine.session import describe
from ..interrupt import answered_by, end
from ..units import GIB, MIB, Unit
from .common import (
    add_run_flags,
    config_from,
    end_progress,
    refuse_unwritable,
    save_runs,
    telling,
    write_document,
)

DEFAULT_GPU = "H100 80GB"


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_run_flags(parser)
    add_gpu_flag(parser)
    parser.add_argument("--json", metavar="FILE", help="write the prediction as JSON; - for standard output")
    parser.add_argument("--save", metavar="FILE", help="write a .gpumem recording of it, to open, compare and export")
    parser.add_argument("--table", action="store_true", help="weights, inference and training by data type")
    parser.set_defaults(command=main)


def add_gpu_flag(parser: argparse.ArgumentParser) -> None:
    """`--gpu`, shared by what predicts."""
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="a name, a size or both: A100, 24GB, 'RTX 4090:20GiB' for 20 GiB of it "
        f"(default: the one here, or else {DEFAULT_GPU})",
    )


def chosen_gpu(name: str | None) -> Gpu:
    """The GPU asked for, the one that is here, or the default; how a name was understood goes to standard error.

    Raises:
        UserError: No GPU known here is meant.
    """
    if name is not None:
        found = understand(name)
        if found.said:
            sys.stderr.write(f"--gpu {found.said}\n")
        return found.gpu
    return gpu_here() or gpu(DEFAULT_GPU)


def main(flags: argparse.Namespace) -> int:
    """Predict; 0 also if it does not fit."""
    config, card = config_from(flags), chosen_gpu(flags.gpu)
    for name in ("json", "save"):
        refuse_unwritable(name, getattr(flags, name))
    if flags.table:
        return _calculator(config, card, flags.json)
    predict = telling(predicted, card)
    prediction = predict(config)
    document = prediction.as_document()
    end_progress()
    say = sys.stdout.write if flags.json != "-" else lambda _: 0
    say(f"{describe(config)} on {card.name}, predicted\n\n{_text(prediction, document)}\n")
    sys.stdout.flush()  # the answer first: Ctrl-C leaves what follows, and takes nothing back

    def write() -> None:
        with ExitStack() as results:  # each is tried, whatever becomes of the other
            if flags.json:
                results.callback(write_document, document, flags.json)
            if flags.save:
                results.callback(save_runs, [prediction.run], Path(flags.save))

    def leave() -> None:
        write()
        end()

    with answered_by(leave):
        document |= largest_that_fit(prediction, predict)
    end_progress()
    say(_largest(document))
    write()
    return 0


def _text(prediction: Prediction, document: dict[str, Any]) -> str:
    """The prediction for people."""
    unit = Unit("GiB", GIB, 3) if prediction.peak_bytes >= GIB else Unit("MiB", MIB, 3)
    show = unit.show
    moments = {name: document[name] for name in ("loaded", "after_first_step", "peak")}
    lines = [f"{unit.name:<16}" + "".join(f"{name.replace('_', ' '):>18}" for name in moments)]
    for category in Category:
        sizes = [moment["by_category"][category.key] for moment in moments.values()]
        if any(sizes):
            info = CATEGORIES[category]
            lines.append(f"{info.letter} {info.title:<14}" + "".join(f"{show(size):>18}" for size in sizes))
    lines.append(f"{'allocated':<16}" + "".join(f"{show(m['allocated_bytes']):>18}" for m in moments.values()))
    peak = document["peak"]
    lines += ["", f"The peak is in step {peak['step']}, {peak['phase']}, {peak['module']}."]
    if prediction.managed_bytes:
        lines.append(f"Paged optimizer state, in CUDA managed memory besides: {show(prediction.managed_bytes)}.")
    if prediction.pinned_bytes:
        lines.append(f"Pinned memory of the host besides: {show(prediction.pinned_bytes)}.")
    lines += _filled([verdict(prediction), *_cautions(prediction.config)])
    if 0 < prediction.max_positions < prediction.config.seq_len:
        lines.append(f"{prediction.config.seq_len} tokens in a row: the model was made for {prediction.max_positions}.")
    return "\n".join(lines)


def verdict(prediction: Prediction) -> str:
    """The verdict, fits or not, and why, in a line."""
    gib = Unit("GiB", GIB, 2).full
    there = f"the {gib(prediction.available_bytes)} of {prediction.gpu}"
    bound, reserved = gib(prediction.safe_bound_bytes), gib(prediction.reserved_bytes)
    margin = gib(abs(prediction.margin_bytes))
    if prediction.verdict is Verdict.TOO_LARGE:
        return f"It does not fit in {there}: at most {bound}, {margin} too little."
    if prediction.verdict is Verdict.FITS:
        return f"It fits in {there}: at most {bound}, {margin} to spare; the allocator reserves {reserved} for it."
    gaps = f"gaps between blocks would have the allocator reserve {reserved}"
    hint, expandable = "", prediction.expandable_bytes
    if expandable is not None:
        fits = expandable + prediction.safe_bound_bytes - prediction.peak_bytes <= prediction.available_bytes
        hint = f"; with {EXPANDABLE} it would be {gib(expandable)}, " + ("which fits" if fits else "still too much")
    if prediction.verdict is Verdict.TIGHT:
        return (
            f"It fits in {there}, tightly: at most {bound} are allocated; {gaps}, "
            f"so that it gives cached blocks back and asks again, which takes time{hint}."
        )
    return f"It does not fit in {there}: at most {bound} are allocated, but {gaps}{hint}."


def _largest(document: dict[str, Any]) -> str:
    batch, length = (document[name] or "none" for name in ("max_batch_size", "max_sequence_length"))
    return f"Largest batch size that fits: {batch}; largest sequence length at this batch size: {length}.\n"


def _calculator(config: RunConfig, card: Gpu, target: str | None) -> int:
    """The memory calculator's table, every figure from a prediction."""
    from ...engine.prediction.calculator import calculator

    rows = calculator(config, telling(predicted, card), card)
    end_progress()
    with ExitStack() as results:
        if target:
            batch = {"batch_size": config.batch_size, "seq_len": config.seq_len}
            document = {"model": config.model, "gpu": card.name, "predicted": True, **batch, "rows": rows}
            results.callback(write_document, document, target)
        if target == "-":
            return 0
        columns = [name for name in rows[0] if name != "dtype"]
        show = Unit("GiB", GIB, 2).show
        heads = [name.removesuffix("_bytes").replace("_", " ") for name in columns]
        lines = [f"{describe(config)} on {card.name}: predicted peak in GiB", ""]
        lines.append(f"{'dtype':<18}" + "".join(f"{head:>16}" for head in heads))
        lines += [f"{row['dtype']:<18}" + "".join(f"{show(row[c]):>16}" for c in columns) for row in rows]
        qlora = config.with_({"lora": True, "quantization": "nf4", "dtype": "mixed"})
        lines += ["", *_filled(["Quantized weights are trained beside, under bfloat16 autocast.", *_cautions(qlora)])]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _cautions(config: RunConfig) -> list[str]:
    """The surprises in a configuration's memory, in sentences."""
    return [f"{line[0].upper()}{line[1:]}." for line in techniques.cautions(config)]


def _filled(sentences: list[str]) -> list[str]:
    """Within the terminal's width."""
    columns = shutil.get_terminal_size().columns - 1
    return [line for sentence in sentences for line in textwrap.wrap(sentence, columns)]
