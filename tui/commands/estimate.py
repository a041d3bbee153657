"""`gpumem-tui estimate`: a run's memory before it is run, on a GPU that need not be there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ...engine.config import RunConfig, show
from ...engine.prediction import job
from ...engine.prediction.gpu_here import gpu_here
from ...engine.prediction.gpus import Gpu, gpu, understand
from ...engine.prediction.known import largest_known, predicted
from ...engine.prediction.libraries_loading import libraries_loading
from ...engine.prediction.outcome import Prediction
from ...engine.prediction.prediction_text import cautions, filled, of_ranks
from ...engine.techniques import all_options, describe
from ..interrupt import answered_by, end
from ..units import GIB, Unit
from .common import (
    add_run_flags,
    config_from,
    end_progress,
    refuse_beside,
    refuse_unwritable,
    save_runs,
    tell,
    telling,
    typed_flags,
    typed_settings,
    write_document,
)

DEFAULT_GPU = "H100 80GB"
LOOKED_FOR = {
    "batch_size": "largest batch", "seq_len": "largest sequence length", "new_tokens": "largest number of new tokens"
}  # fmt: skip
_NEW_TOKENS = all_options()["new_tokens"]


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_run_flags(parser)
    add_gpu_flag(parser)
    parser.add_argument("--json", metavar="FILE", help="write the prediction as JSON; - for standard output")
    parser.add_argument("--save", metavar="FILE", help="write a .gpumem recording of it, to open, compare and export")
    about = "of generating N tokens after each row of --seq-len, instead of training"
    parser.add_argument("--generate", metavar="N", help=about)
    about = "a loop of your own: FUNCTION returns a gpumem_tui.predict.Training(model, optimizer, batch, step)"
    parser.add_argument("--script", metavar="FILE:FUNCTION", help=about)
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


def config_and_gpu(flags: argparse.Namespace) -> tuple[RunConfig, Gpu]:
    """The run that is predicted, and the GPU it is predicted for; a device, on which nothing is run, is told of.

    Raises:
        UserError: Whatever in the flags cannot be.
    """
    config, card = config_from(flags), chosen_gpu(flags.gpu)
    say_unused(flags.device, card)
    return config, card


def say_unused(device: str, card: Gpu) -> None:
    """Tell on standard error of a device that was asked for, on which nothing is run."""
    if device != "auto":
        sys.stderr.write(f"--device {device}: nothing is run there; the prediction is for --gpu {card.name!r}\n")


def main(flags: argparse.Namespace) -> int:
    """Predict; 0 also if it does not fit."""
    for name in ("json", "save"):
        refuse_unwritable(name, getattr(flags, name))
    if flags.script:
        return _of_script(flags)
    if flags.table:
        return _calculator(flags)
    if flags.generate is not None:
        flags.settings += ["workload=generate", f"new_tokens={_NEW_TOKENS.parse(flags.generate, '--generate')}"]
    config, card = config_and_gpu(flags)
    predict = telling(predicted, card)
    kinds = job.each_kind(predict(config), lambda rank: predicted(config, card, rank))
    prediction = max(kinds, key=lambda one: one.peak_bytes)
    document = prediction.as_document()
    if prediction.ranks > 1:
        document["ranks"] = msgspec.to_builtins(job.figures(kinds))
    end_progress()
    say = sys.stdout.write if flags.json != "-" else lambda _: 0
    say("\n".join([str(prediction), *filled(of_ranks(kinds)), ""]))
    sys.stdout.flush()  # the answer first: Ctrl-C leaves what follows, and takes nothing back

    def leave() -> None:
        _write(flags, kinds, document)
        end()

    with answered_by(leave):
        document |= largest_known(prediction, partial(_search, prediction.config, card), card)
    end_progress()
    say("\n".join([*filled([_largest(document, config)]), ""]))
    _write(flags, kinds, document)
    return 0


def _of_script(flags: argparse.Namespace) -> int:
    """Predict a loop of somebody's own."""
    others = [*typed_flags(flags), *["--generate"] * (flags.generate is not None), *["--table"] * flags.table]
    refuse_beside("--script", others, "what is run is all in the script; --gpu, --json and --save go with it")
    card = chosen_gpu(flags.gpu)
    with libraries_loading():
        from ...engine.prediction.any_module import predict, training_of

    prediction = predict(*training_of(flags.script), gpu=card, name=flags.script)
    if flags.json != "-":
        sys.stdout.write(f"{prediction}\n")
    _write(flags, [prediction], prediction.as_document())
    return 0


def _search(config: RunConfig, card: Gpu, other: RunConfig) -> Prediction:
    """Predict another value on the way to the largest, told of by what is looked for: the answer is there already."""
    looked_for, value = next((title, other[name]) for name, title in LOOKED_FOR.items() if other[name] != config[name])
    tell(f"{looked_for} that fits: trying {value}")
    return predicted(other, card)


def _write(flags: argparse.Namespace, kinds: Sequence[Prediction], document: dict[str, Any]) -> None:
    """The files that were asked for; each is tried, whatever becomes of the other."""
    with ExitStack() as results:
        if flags.json:
            results.callback(write_document, document, flags.json)
        if flags.save:
            results.callback(save_runs, job.runs(kinds), Path(flags.save))


def _largest(document: dict[str, Any], config: RunConfig) -> str:
    """The largest values that fit, and where it is the model's positions and not memory that end them."""
    said = [f"Largest batch size that fits: {document['max_batch_size'] or 'none'}"]
    of_new = "max_new_tokens", "number of new tokens", config.seq_len
    for name, title, before in (("max_sequence_length", "sequence length", 0), of_new):
        if name in document:
            positions = document["max_positions"]
            made_for = f", all the {positions} positions that the model was made for"
            ended = made_for * (document[name] + before == positions)
            said.append(f"largest {title} at this batch size: {document[name] or 'none'}{ended}")
    return "; ".join(said) + "."


def _calculator(flags: argparse.Namespace) -> int:
    """The memory calculator's table, every figure from a prediction."""
    with libraries_loading():
        from ...engine.prediction.calculator import SETS, calculator

    given = {"--generate": flags.generate is not None, "--save": flags.save is not None}
    others = [flag for flag in typed_flags(flags) if flag in ("--preset", "--memory-limit")]
    others += [flag for flag, is_given in given.items() if is_given]
    others += [f"{name}={show(value)}" for name, value in typed_settings(flags).items()
               if name in SETS or (name, value) == ("workload", "generate")]  # fmt: skip
    refuse_beside("--table", others, f"its rows and columns set {', '.join(SETS)} and what is done")
    config, card = config_and_gpu(flags)
    target = flags.json
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
        in_gib = Unit("GiB", GIB, 2).show
        heads = [name.removesuffix("_bytes").replace("_", " ") for name in columns]
        lines = [f"{describe(config)} on {card.name}: predicted peak in GiB", ""]
        lines.append(f"{'dtype':<18}" + "".join(f"{head:>16}" for head in heads))
        lines += [f"{row['dtype']:<18}" + "".join(f"{in_gib(row[c]):>16}" for c in columns) for row in rows]
        qlora = config.with_({"lora": True, "quantization": "nf4", "dtype": "mixed"})
        lines += ["", *filled(["Quantized weights are trained beside, under bfloat16 autocast.", *cautions(qlora)])]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0
