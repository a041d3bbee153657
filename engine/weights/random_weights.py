"""A profile's weights: drawn as a run of it would draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bits import FORMATS, RUN, Bits
from .tensors import CHUNK, GLIMPSED, ModelWeights, stored_transposed

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """Normal weights that are drawn again, the same ones, at each pass.

    Attributes:
        std: Their standard deviation.
        seed: Of the generator.
        transposed: Whether a run would store them as inputs by outputs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    std: float
    seed: int = 0
    transposed: bool = False

    @property
    def read_as(self) -> str:
        """The format of its bits: its dtype's own."""
        return self.dtype

    @property
    def alike(self) -> tuple[object, ...]:
        """Tensors that agree in this differ by nothing but the draw."""
        return self.shape, self.dtype, self.std, self.transposed

    def chunks(self) -> Iterator[Bits]:
        """Drawn in float32 and rounded."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        kind = next(name for name, short in DTYPES.items() if short == self.dtype)
        numel = math.prod(self.shape)
        buffer = torch.empty(min(CHUNK, numel))
        for start in range(0, numel, CHUNK):
            part = buffer[: min(CHUNK, numel - start)].normal_(0.0, self.std, generator=generator)
            rounded = part.to(getattr(torch, kind))
            integers = rounded.view(torch.int32 if rounded.itemsize == 4 else torch.int16)
            yield integers.numpy().view(FORMATS[self.dtype].unsigned)

    def glimpse(self) -> Bits:
        """The first: one is like the other."""
        bits = next(self.chunks())
        return bits[: len(bits) // RUN * RUN].reshape(-1, RUN)[:GLIMPSED]

    def runs(self, indices: NDArray[np.int64]) -> Bits:
        """Found by drawing all up to the last of them again."""
        found = np.empty((len(indices), RUN), FORMATS[self.dtype].unsigned)
        ahead = CHUNK // RUN
        for number, bits in enumerate(self.chunks()):
            first = number * ahead
            here = slice(*np.searchsorted(indices, (first, first + ahead)))
            if here.stop > here.start:
                whole = len(bits) // RUN
                found[here] = bits[: whole * RUN].reshape(whole, RUN)[indices[here] - first]
        return found


def random_model(config: Mapping[str, Any], dtype: str) -> ModelWeights:
    """A model that is built with random weights.

    Args:
        config: Content of a config.json.
        dtype: Of the weights: `float32`, `float16` or `bfloat16`.
    """
    from ..library_logs import quiet_libraries
    from ..model_shell import shell_of
    from ..weight_loading import RANDOM_STD

    quiet_libraries()
    from transformers import AutoConfig

    shapes = {name: tuple(p.shape) for name, p in shell_of(AutoConfig.for_model(**config)).named_parameters()}
    transposed = stored_transposed(shapes)
    tensors = tuple(
        RandomTensor(name, shape, DTYPES[dtype], RANDOM_STD, transposed=name in transposed)
        for name, shape in shapes.items()
        if len(shape) >= 2
    )
    return ModelWeights(tensors, config, len(shapes) - len(tensors), {}, random=True)
