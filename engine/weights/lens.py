"""A model's weights, one tensor after the other: a stream of reports that can be left at any time."""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from .bits import Bits
from .random_weights import RandomTensor
from .survey import Survey, survey
from .tensors import WeightTensor

if TYPE_CHECKING:
    from .report import TensorReport
    from .scheme import Scheme

T = TypeVar("T")
R = TypeVar("R")

SURVEYS_AHEAD = 64
"""Tensors whose samples, a MiB each, may wait to be measured."""


def reports(tensors: Sequence[WeightTensor], schemes: Sequence[Scheme], exact: bool = False) -> Iterator[TensorReport]:
    """Survey and measure tensors, on every core, in their order.

    Surveys run ahead: they need no library, and are done with much of a model
    by the time those are imported.

    Args:
        tensors: Which.
        schemes: Under which schemes.
        exact: Measure every weight, and not a sample.

    Yields:
        A report of each; random tensors that differ by nothing but the draw share theirs.

    Raises:
        UserError: One cannot be read, or holds NaN or an infinity.
    """
    left = Event()
    distinct: dict[object, WeightTensor] = {}
    for tensor in tensors:
        distinct.setdefault(_alike(tensor), _Leavable(tensor, left))
    known: dict[object, TensorReport] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            surveys = _ahead(
                pool, lambda tensor: survey(tensor, exact), distinct.values(), 0 if exact else SURVEYS_AHEAD
            )
            measured = _ahead(pool, lambda found: _measure(found, schemes), _begun(surveys), os.cpu_count() or 1)
            for tensor in tensors:
                key = _alike(tensor)
                if key not in known:
                    known[key] = next(measured)
                yield msgspec.structs.replace(known[key], name=tensor.name)
        finally:
            left.set()
            pool.shutdown(cancel_futures=True)


def _alike(tensor: WeightTensor) -> object:
    return tensor.alike if isinstance(tensor, RandomTensor) else tensor.name


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """Results in the order of the items, of which `count` more than are asked for are under way."""
    under_way: deque[Future[R]] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) > count:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _begun(surveys: Iterator[Survey]) -> Iterator[Survey]:
    """The same, with the libraries imported while those ahead are under way."""
    for number, found in enumerate(surveys):
        if not number:
            import_libraries()
        yield found


def _measure(found: Survey, schemes: Sequence[Scheme]) -> TensorReport:
    from .measure import measure

    return measure(found, schemes)


def import_libraries() -> None:
    """Import what measures: what bitsandbytes has compiled for each new shape is sooner done as it is written."""
    from ..library_logs import quiet_loggers
    from ..prediction.libraries_loading import libraries_loading

    quiet_loggers()
    with libraries_loading():
        importlib.import_module("bitsandbytes.functional")


@dataclass(frozen=True, slots=True)
class _Leavable:
    """A tensor that is read no further once nobody wants to know."""

    tensor: WeightTensor
    left: Event

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def read_as(self) -> str:
        return self.tensor.read_as

    @property
    def transposed(self) -> bool:
        return self.tensor.transposed

    def chunks(self) -> Iterator[Bits]:
        for bits in self.tensor.chunks():
            if self.left.is_set():
                raise InterruptedError
            yield bits

    def runs(self, indices: NDArray[np.int64]) -> Bits:
        return self.tensor.runs(indices)
