"""Which techniques help most: predicted one by one, and in the combinations that promise something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .. import techniques
from ..config import RunConfig, UserError, Value, show
from .outcome import Prediction

Predict = Callable[[RunConfig], Prediction]
Changes = Mapping[str, Value]

LARGEST_COMBINATION = 4


@dataclass(frozen=True, slots=True)
class Advice:
    """A change of the configuration and what it would do.

    Attributes:
        changes: Settings by name.
        prediction: Of the changed run.
        saved_bytes: At the peak, against the run as it is.
        costs: In time, in words.
    """

    changes: dict[str, Value]
    prediction: Prediction
    saved_bytes: int
    costs: str

    @property
    def text(self) -> str:
        """As `--set` takes it."""
        return " ".join(f"{name}={show(value)}" for name, value in self.changes.items())


def advise(config: RunConfig, predict: Predict) -> tuple[Prediction, list[Advice], list[Advice]]:
    """Rank techniques by the bytes they save at the predicted peak.

    Args:
        config: The run as it is.
        predict: Predicts one configuration; raises UserError for one that cannot run.

    Returns:
        The run as it is; single changes that save something, most first; and
        what fits of the combinations, most saved first.
    """
    now = predict(config)
    alone: list[Advice] = []
    together: list[Changes] = []  # need another technique to be possible at all
    for changes in single_changes(config):
        advice = _try(config, changes, now, predict)
        if advice is None:
            together.append(changes)
        elif advice.saved_bytes > 0:
            alone.append(advice)
    alone.sort(key=lambda advice: -advice.saved_bytes)
    combined = [advice for advice in _combined(config, alone, together, now, predict) if advice.prediction.fits]
    combined.sort(key=lambda advice: -advice.saved_bytes)
    return now, alone, combined


def single_changes(config: RunConfig) -> Iterator[Changes]:
    """Every other value of every switch, possible or not; accumulation at the same effective batch."""
    for technique in techniques.registry().values():
        for value in technique.switch.choices:
            if value == config[technique.name]:
                continue
            if technique.name != "accumulation":
                yield {technique.name: value}
            elif int(value) > config.integer("accumulation") and not config.batch_size % (
                parts := int(value) // config.integer("accumulation")
            ):
                yield {"accumulation": value, "batch_size": config.batch_size // parts}


def _combined(
    config: RunConfig, alone: list[Advice], together: list[Changes], now: Prediction, predict: Predict
) -> Iterator[Advice]:
    """The best change with each other technique's best, the best of those with each other's again, and so on."""
    best: dict[str, Changes] = {}
    for changes in (*(advice.changes for advice in alone), *together):
        best.setdefault(next(iter(changes)), changes)
    so_far: Changes = alone[0].changes if alone else {}
    for _ in range(1, LARGEST_COMBINATION):
        others = [changes for name, changes in best.items() if name not in so_far]
        larger = [a for other in others if (a := _try(config, {**so_far, **other}, now, predict)) is not None]
        yield from larger
        if not larger:
            return
        so_far = max(larger, key=lambda advice: advice.saved_bytes).changes


def _try(config: RunConfig, changes: Changes, now: Prediction, predict: Predict) -> Advice | None:
    try:
        predicted = predict(config.with_(changes))
    except UserError:
        return None
    saved = now.peak_bytes - predicted.peak_bytes
    return Advice(dict(changes), predicted, saved, _costs(changes, predicted))


def _costs(changes: Changes, predicted: Prediction) -> str:
    known = techniques.registry()
    words = [known[name].cost_of(value) for name, value in changes.items() if name in known]
    layers = {layer for recompute in predicted.document.recomputes for layer in recompute.layers}
    if layers and any(name.startswith("checkpointing") for name in changes):
        tokens = predicted.config.batch_size * predicted.config.seq_len * predicted.config.integer("accumulation")
        flops = 2 * (predicted.document.parameters or 0) * tokens
        words.append(f"{len(layers)} layers are computed twice, up to {flops / 1e12:.3g} TFLOP more a step")
    if predicted.managed_bytes:
        words.append(f"up to {2 * predicted.managed_bytes / 2**30:.2f} GiB over PCIe a step, there and back")
    return "; ".join(words)
