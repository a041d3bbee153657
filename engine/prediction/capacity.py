"""The largest run of its kind that a GPU holds."""

from __future__ import annotations

from collections.abc import Callable

from ..config import RunConfig
from .gpus import Gpu
from .neighbours import Neighbours
from .outcome import Prediction, Verdict
from .search import largest


def largest_that_fit(prediction: Prediction, predicted: Callable[[RunConfig], Prediction], gpu: Gpu) -> dict[str, int]:
    """The largest batch size and the largest sequence length that fit, everything else being equal.

    Args:
        prediction: Of the run as it is.
        predicted: Predicts other ones on the same GPU.
        gpu: Which that is.

    Returns:
        `max_batch_size` and, where rows are tokens, `max_sequence_length`, of what is generated
        `max_new_tokens`; 0: not even the smallest.
    """
    config = prediction.config

    def search(name: str, smallest: int, most: int) -> int:
        neighbours = Neighbours(gpu, prediction.available_bytes)

        def bound_at(value: int) -> int:
            found = prediction if value == config[name] else predicted(config.with_({name: value}))
            neighbours.learn(value, found)
            # Gaps between blocks are no part of the bound.
            return found.available_bytes + 1 if found.verdict is Verdict.FRAGMENTED else found.safe_bound_bytes

        start, available = config.integer(name), prediction.available_bytes
        found = largest(bound_at, start, available, most, neighbours)
        return found if found >= smallest else 0

    found = {"max_batch_size": search("batch_size", 1, 65_536)}
    if config.generates:
        longest = prediction.max_positions - config.seq_len if prediction.max_positions else 1 << 20
        found["max_new_tokens"] = search("new_tokens", 1, max(1, longest))
    elif prediction.document.steps[0].tokens is not None:
        found["max_sequence_length"] = search("seq_len", 2, prediction.max_positions or 1 << 20)
    return found
