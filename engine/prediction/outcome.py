"""The outcome of a prediction. Loads no torch, so that those who ask need not either."""

from __future__ import annotations

import enum
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self, get_type_hints

import msgspec

from ..config import RunConfig
from ..report import RunDocument, report
from ..run import Run
from ..wire import MalformedError, pack_whole_run, unpack_whole_run

EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True"


RESERVED_SPREAD_BYTES = 2 << 30
"""Between ranks of one job, measured."""


class Verdict(enum.StrEnum):
    """True if a run goes through in a GPU's memory."""

    FITS = "fits"
    """Also with the gaps between blocks that the caching allocator keeps."""
    TIGHT = "fits tightly"
    """The allocator has to give CUDA cached blocks back and ask again."""
    FRAGMENTED = "does not fit: fragmented"
    """The verdict where the allocated bytes would fit, but not with the gaps between blocks."""
    TOO_LARGE = "does not fit"


@dataclass(frozen=True)
class Prediction:
    """The figures of a run that has not happened, and the run itself.

    Attributes:
        config: What was asked about.
        gpu: Name of the GPU.
        loaded_bytes: Allocated when the model is loaded.
        after_step_bytes: Allocated after the first optimizer step.
        peak_bytes: The most allocated at any event.
        by_category: Composition of the peak, by the categories' keys; sums to it.
        by_phase: Composition at the highest moment of each phase, by the phases' and the
            categories' keys.
        peak_phase: What the loop is doing then.
        reserved_bytes: The most the caching allocator holds where there is plenty.
        expandable_bytes: The most it would hold with expandable segments; None: not asked, since it makes no
            difference to what fits.
        verdict: Whether it fits, gaps between blocks included.
        managed_bytes: Of paged optimizers, outside the allocator.
        pinned_bytes: Of the host's memory, page-locked, the most at once.
        unsure_bytes: What may add to the peak and nobody knows: what some kernels take, what NCCL holds for longer by
            chance; part of the bound.
        safe_bound_bytes: Above what will be measured.
        available_bytes: What the GPU has for the allocator: its memory without CUDA's context.
        max_positions: Tokens in a row that the model was made for; 0: not said.
        notes: What was taken for granted, a line each, with its place in the script.
        seconds: What predicting took.
        whole_run: The run itself, or as it came from the process that predicts.
        alike: Ranks of the job in groups that hold the same; this is of one of them.
        outside_torch_bytes: On the GPU beside what torch allocates: CUDA's context, NCCL's communicators.
    """

    config: RunConfig
    gpu: str
    loaded_bytes: int
    after_step_bytes: int
    peak_bytes: int
    by_category: dict[str, int]
    by_phase: dict[str, dict[str, int]]
    peak_phase: str
    reserved_bytes: int
    expandable_bytes: int | None
    verdict: Verdict
    managed_bytes: int
    pinned_bytes: int
    unsure_bytes: int
    safe_bound_bytes: int
    available_bytes: int
    max_positions: int
    notes: tuple[str, ...]
    seconds: float
    whole_run: Run | bytes = field(repr=False)
    alike: tuple[tuple[int, ...], ...] = ((0,),)
    outside_torch_bytes: int = 0

    @cached_property
    def run(self) -> Run:
        """Loading and some steps over fake tensors: what can be done with a run can be done with it."""
        if isinstance(self.whole_run, Run):
            return self.whole_run
        run = unpack_whole_run(self.whole_run)
        run.config = self.config  # another that holds the same may have been predicted
        return run

    @cached_property
    def document(self) -> RunDocument:
        """The document that `run --json` would write of the run."""
        return report(self.run)

    def packed(self) -> bytes:
        """The prediction as it goes to another process or to disk; `unpacked` reads it back."""
        run = self.whole_run if isinstance(self.whole_run, bytes) else pack_whole_run(self.whole_run)
        return _encoder.encode(_Packed({name: getattr(self, name) for name in _figures()}, run))

    @classmethod
    def unpacked(cls, packed: bytes, config: RunConfig) -> Self:
        """The inverse of `packed`.

        Args:
            packed: What it gave.
            config: What was asked about.

        Raises:
            MalformedError: It is none.
        """
        try:
            told = _decoder.decode(packed)
            figures = {name: msgspec.convert(told.figures[name], hint) for name, hint in _figures().items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
            raise MalformedError(f"a prediction: {error}") from None
        return cls(config=config, whole_run=told.run, **figures)

    def as_document(self) -> dict[str, Any]:
        """The document of `run`, and what only a prediction has to say."""
        return self.document.as_dict() | {
            "predicted": True,
            "gpu": self.gpu,
            "fits": self.fits,
            "verdict": self.verdict.value,
            "expandable_bytes": self.expandable_bytes,
            "margin_bytes": self.margin_bytes,
            "safe_bound_bytes": self.safe_bound_bytes,
            "reserved_bytes": self.reserved_bytes,
            "reserved_band_bytes": list(self.reserved_band_bytes),
            "outside_torch_bytes": self.outside_torch_bytes,
            "unsure_bytes": self.unsure_bytes,
            "max_positions": self.max_positions,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """The text that `estimate` prints."""
        from .prediction_text import heading, text

        return f"{heading(self)}\n\n{text(self)}"

    def save(self, path: str | Path) -> None:
        """Write a `.gpumem` recording: `gpumem-tui open` shows it, every command that takes a recording reads it.

        Raises:
            OSError: It cannot be written there; no part of it is.
        """
        from ..recording import write

        write(Path(path), [self.run])

    def export(self, path: str | Path, format_name: str) -> None:
        """Write it in another program's format.

        Args:
            path: Where.
            format_name: As in `gpumem-tui export --format`.

        Raises:
            OSError: It cannot be written there; no part of it is.
            UserError: There is no such format.
        """
        from .. import exports
        from ..exports.exported_run import named

        exports.export(named([self.run]), exports.format_named(format_name), Path(path))

    def open(self) -> None:
        """Show it in the app, in this terminal, until that is left."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prediction.gpumem"
            self.save(path)
            subprocess.run([sys.executable, "-P", "-m", "gpumem_tui.tui", "open", str(path)], check=False)

    @property
    def rank(self) -> int:
        """The rank of the job that this is of."""
        return self.run.id.rank

    @property
    def ranks(self) -> int:
        """Processes of the job, one a GPU."""
        return sum(map(len, self.alike))

    @property
    def reserved_band_bytes(self) -> tuple[int, int]:
        """Bounds of the bytes reserved; of ranks that run the same one has had 2 GiB more than another."""
        spread = RESERVED_SPREAD_BYTES if self.ranks > 1 else 0
        return max(self.peak_bytes, self.reserved_bytes - spread), self.reserved_bytes + spread

    def bound_bytes(self, reserved_bytes: int) -> int:
        """Above what will be measured, of what the allocator would hold: as far as the safe bound is above the peak."""
        return reserved_bytes + self.safe_bound_bytes - self.peak_bytes

    @property
    def reserved_bound_bytes(self) -> int:
        """The bytes that have to be there for the run to fit without giving blocks back."""
        return self.bound_bytes(self.reserved_bytes)

    @property
    def fits(self) -> bool:
        """True if the run goes through."""
        return self.verdict in (Verdict.FITS, Verdict.TIGHT)

    @property
    def margin_bytes(self) -> int:
        """Bytes left above the safe bound; negative: bytes missing."""
        return self.available_bytes - self.safe_bound_bytes


class _Packed(msgspec.Struct):
    """A prediction: its figures by name, and the run as `wire.pack_whole_run` packs it."""

    figures: dict[str, Any]
    run: bytes


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_Packed)


@cache
def _figures() -> dict[str, Any]:
    """Type by name of all that is not the configuration or the run."""
    return {name: hint for name, hint in get_type_hints(Prediction).items() if name not in ("config", "whole_run")}
