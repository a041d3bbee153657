"""The largest run of its kind that a GPU holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..config import RunConfig
from .gpus import Gpu
from .neighbours import Neighbours
from .outcome import Prediction, Verdict
from .search import largest

Predict = Callable[[RunConfig], Prediction]


def largest_that_fit(
    prediction: Prediction, predicted: Predict, gpu: Gpu, beside: Predict | None = None
) -> dict[str, int]:
    """The largest batch size and the largest sequence length that fit, everything else being equal.

    Args:
        prediction: Of the run as it is.
        predicted: Predicts other ones on the same GPU.
        gpu: Which that is.
        beside: Does so on another thread at the same time; None: nobody does.

    Returns:
        `max_batch_size` and, where rows are tokens, `max_sequence_length`, of what is generated
        `max_new_tokens`; 0: not even the smallest.

    Raises:
        UserError: One of those asked for cannot be predicted.
    """
    positions = prediction.max_positions
    searches = [_Search("max_batch_size", "batch_size", 1, 65_536)]
    if prediction.config.generates:
        left = positions - prediction.config.seq_len
        searches.append(_Search("max_new_tokens", "new_tokens", 1, left if left > 0 else 1 << 20))
    elif prediction.document.steps[0].tokens is not None:
        searches.append(_Search("max_sequence_length", "seq_len", 2, positions or 1 << 20))
    if beside is None:
        return {search.name: search.result(prediction, predicted, gpu) for search in searches}
    with ThreadPoolExecutor(1) as thread:
        others = [(search.name, thread.submit(search.result, prediction, beside, gpu)) for search in searches[1:]]
        first = {searches[0].name: searches[0].result(prediction, predicted, gpu)}
        return first | {name: other.result() for name, other in others}


class _Search(NamedTuple):
    """A search for the largest value of an option.

    Attributes:
        name: Of the result.
        option: Which is varied.
        smallest: Value that makes sense.
        most: Where to stop.
    """

    name: str
    option: str
    smallest: int
    most: int

    def result(self, prediction: Prediction, predicted: Predict, gpu: Gpu) -> int:
        """The largest value that fits; 0: not even the smallest does."""
        config, available = prediction.config, prediction.available_bytes
        neighbours = Neighbours(gpu, available)

        def bound_at(value: int) -> int:
            same = value == config[self.option]
            found = prediction if same else predicted(config.with_({self.option: value}))
            neighbours.learn(value, found)
            # Gaps between blocks are no part of the bound.
            return available + 1 if found.verdict is Verdict.FRAGMENTED else found.safe_bound_bytes

        found = largest(bound_at, config.integer(self.option), available, self.most, neighbours)
        return found if found >= self.smallest else 0
