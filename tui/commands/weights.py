"""`gpumem-tui weights`: what quantization does to a model's weights."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ...engine.config import UserError
from ...engine.weights.report import Entry, Measured
from ...engine.weights.scheme import Scheme
from ...engine.weights.schemes import registry
from ..units import UNKNOWN, count, tail, unit_for
from .common import end_progress, refuse_unwritable, tell, write_document

if TYPE_CHECKING:
    from ...engine.weights.tensors import ModelWeights

DEFAULT_PROFILE = "tiny"
KEPT_FOR = "nf4-double"
"""The scheme whose worst tensors are listed: QLoRA's."""
LISTED = 5
RANDOM = (
    "Random weights are normal: kurtosis 3, nothing beyond 6 sigma. Trained ones have outliers: int8 of a whole\n"
    "tensor loses 5 to 20 dB more on them, NF4 in blocks of 64 less than 1."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("file", nargs="?", metavar="FILE", help="a .safetensors file")
    what.add_argument("--model", help="a folder of .safetensors files, or a hub id")
    what.add_argument("--profile", help="a model profile with random weights (see: gpumem-tui profiles)")
    parser.add_argument("--schemes", metavar="KEYS", help=f"some of, or all: {', '.join(registry())}")
    parser.add_argument("--exact", action="store_true", help="measure every weight, and not a sample of each tensor")
    parser.add_argument("--json", metavar="FILE", help="write everything as one JSON document; - for standard output")
    parser.add_argument("--jsonl", action="store_true", help="print a line of JSON for each tensor as it is measured")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Measure; 0 if every tensor could be."""
    schemes = _chosen(flags.schemes)
    refuse_unwritable("json", flags.json)
    name, weights = _opened(flags)
    for left_out, reason in weights.left_out.items():
        sys.stderr.write(f"gpumem-tui: left out: {left_out} {reason}\n")
    if all(scheme.unavailable for scheme in schemes):
        raise UserError(f"--schemes {flags.schemes}: {schemes[0].unavailable}")
    from ...engine.weights.document import document, entries

    made = document(_told(entries(name, weights, schemes, flags.exact), len(weights.tensors), flags.jsonl), schemes)
    end_progress()
    if flags.json:
        write_document(made, flags.json)
    if flags.json != "-" and not flags.jsonl:
        sys.stdout.write(_text(made, schemes))
    return 0


def _told(found: Iterable[Entry], tensors: int, as_lines: bool) -> Iterator[Entry]:
    """The same, with how far it is told; with --jsonl each as a line."""
    for number, entry in enumerate(found):
        if isinstance(entry, Measured):
            tell(f"{number} of {tensors} tensors: {entry.report.name}")
        if as_lines:
            sys.stdout.write(msgspec.json.encode(entry).decode() + "\n")
            sys.stdout.flush()
        yield entry


def _chosen(keys: str | None) -> list[Scheme]:
    known = registry()
    if keys is None:
        return [scheme for scheme in known.values() if scheme.usual]
    if keys == "all":
        return list(known.values())
    chosen = [key.strip() for key in keys.split(",")]
    for key in chosen:
        if key not in known:
            raise UserError(f"--schemes {keys}: there is no scheme {key!r}; there are: {', '.join(known)}")
    return [known[key] for key in dict.fromkeys(chosen)]


def _opened(flags: argparse.Namespace) -> tuple[str, ModelWeights]:
    """The name of the weights, and the weights."""
    if flags.file or flags.model:
        from ...engine.weights.checkpoint import open_checkpoint

        where = flags.file or flags.model
        return Path(where).name, open_checkpoint(where)
    from ...engine.weights.random_weights import random_model
    from ...profiles import model_profile

    profile = model_profile(flags.profile or DEFAULT_PROFILE)
    return profile.name, random_model(profile.config, profile.dtype)


def _text(document: Mapping[str, Any], schemes: Sequence[Scheme]) -> str:
    total = document["total"]
    ways = "every weight" if document["exact"] else "a sample, SQNR within 0.1 dB"
    lines = [
        f"{document['model']}: {total['tensors']} matrices of {count(total['parameters'])} weights are quantized, "
        f"{len(document['kept'])} kept; measured on {ways}",
        *_notes(document),
        "",
        *_schemes(document, schemes),
        *dict.fromkeys(document["unavailable"].values()),
    ]
    shown = KEPT_FOR if KEPT_FOR in total["schemes"] else next(iter(total["schemes"]), None)
    if shown is not None:
        lines += ["", *_worst(document, registry()[shown])]
    return "\n".join(lines) + "\n"


def _notes(document: Mapping[str, Any]) -> Iterator[str]:
    if document["random"]:
        yield RANDOM
    if not document["architecture_known"]:
        yield "The architecture is not known (no config.json beside the file): every matrix counts as quantized."


def _schemes(document: Mapping[str, Any], schemes: Sequence[Scheme]) -> Iterator[str]:
    """One line a scheme."""
    entries = document["total"]["schemes"]
    unit = unit_for(max((entry["bytes"] for entry in entries.values()), default=0))
    yield f"{'':<24}{'bits':>6}{unit.name:>8}{'SQNR dB':>9}{'worst':>7}{'levels used':>14}{'entropy':>9}{'wasted':>8}"
    for scheme in schemes:
        entry = entries.get(scheme.key)
        if entry is None:
            reason = "not installed" if scheme.key in document["unavailable"] else "suits no tensor"
            yield f"{scheme.title:<24}{UNKNOWN:>6}  {reason}"
            continue
        used = f"{entry['levels_used']:.0f} of {entry['levels']}"
        yield (
            f"{scheme.title:<24}{entry['bits_per_parameter']:>6.2f}{unit.show(entry['bytes']):>8}"
            f"{_db(entry['sqnr_db']):>9}{_db(entry['worst']['sqnr_db']):>7}{used:>14}"
            f"{entry['entropy_bits']:>9.2f}{entry['wasted_bits']:>8.2f}"
        )


def _worst(document: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """The tensors that lose most, and what keeping the worst would do."""
    rated = [
        (found["sqnr_db"], tensor) for tensor in document["tensors"]
        if tensor["quantized"] and (found := tensor["schemes"].get(scheme.key)) and found["sqnr_db"] is not None
    ]  # fmt: skip
    width = min(shutil.get_terminal_size().columns, 100) - 34
    yield f"{'lowest SQNR as ' + scheme.title:<{width}}{'kurtosis':>10}{'largest':>12}{'SQNR dB':>10}"
    for sqnr, tensor in sorted(rated, key=lambda pair: pair[0])[:LISTED]:
        largest = f"{tensor['largest_sigma']:.1f} sigma"
        yield f"{tail(tensor['name'], width - 1):<{width}}{tensor['kurtosis']:>10.1f}{largest:>12}{sqnr:>10.1f}"
    keep = document["total"]["keep"].get(scheme.key)
    if keep:
        unit = unit_for(keep["added_bytes"])
        yield (
            f"keep {_tensors(len(keep['tensors']))} in 16 bit: +{unit.full(keep['added_bytes'])}, "
            f"worst {keep['worst_before_db']:.1f} -> {keep['worst_after_db']:.1f} dB"
        )
        yield f"  --set quantization.skip={keep['skip']}"
    elif scheme.setting:
        yield "none stands out: there is nothing to gain from keeping a few of them in 16 bit"


def _tensors(number: int) -> str:
    return f"{number} tensor" + ("s" if number != 1 else "")


def _db(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1f}"
