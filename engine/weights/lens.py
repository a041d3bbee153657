"""A model's weights, one tensor after the other: a stream of reports that can be left at any time."""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from .bits import Bits
from .random_weights import RandomTensor
from .survey import Survey, survey
from .survey_processes import survey_processes
from .tensors import WeightTensor, format_of, geometry

if TYPE_CHECKING:
    from .report import TensorReport
    from .scheme import Scheme

R = TypeVar("R")

SURVEYS_AHEAD = {2: 256, 4: 32}
"""Tensors whose samples may wait to be measured, by the bytes of a weight: about half a MiB each in 16 bit."""
WORTH_PROCESSES = 1 << 30
"""Weights in files that take longer to read than processes to start."""


def reports(
    tensors: Sequence[WeightTensor],
    schemes: Sequence[Scheme],
    exact: bool = False,
    once_imported: Callable[[], object] = lambda: None,
) -> Iterator[TensorReport]:
    """Survey and measure tensors, on every core, in their order.

    One core imports libraries first. Surveys need none: the others are done with
    much of a model by then.

    Args:
        tensors: Which.
        schemes: Under which schemes.
        exact: Measure every weight, and not a sample.
        once_imported: Something else that needs libraries, done before the first tensor is measured.

    Yields:
        A report of each; random tensors that differ by nothing but the draw share theirs.

    Raises:
        UserError: One cannot be read, or holds NaN or an infinity.
    """
    left = Event()
    distinct: dict[object, WeightTensor] = {}
    for tensor in tensors:
        distinct.setdefault(_alike(tensor), tensor)
    waiting = iter(distinct.values())
    known: dict[object, TensorReport] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, ExitStack() as undo:
        undo.callback(pool.shutdown, cancel_futures=True)
        undo.callback(left.set)
        ready = pool.submit(_import_libraries, schemes, once_imported)
        ask = (
            undo.enter_context(survey_processes(list(distinct.values()), exact))
            if _worth_processes(distinct.values())
            else lambda: pool.submit(survey, _Leavable(next(waiting), left), exact)
        )
        ahead = 0 if exact else SURVEYS_AHEAD[max(format_of(tensor).unsigned.itemsize for tensor in tensors)]
        surveyed = _ahead((ask() for _ in distinct), ahead)
        measured = _ahead(
            (pool.submit(_measure, found, schemes, left) for found in _after(ready, surveyed)), os.cpu_count() or 1
        )
        for tensor in tensors:
            key = _alike(tensor)
            if key not in known:
                known[key] = next(measured)
            yield msgspec.structs.replace(known[key], name=tensor.name)


def _alike(tensor: WeightTensor) -> object:
    return tensor.alike if isinstance(tensor, RandomTensor) else tensor.name


def _worth_processes(tensors: Iterable[WeightTensor]) -> bool:
    """True if there is much to read: random weights are not, and drawing them needs a library itself."""
    read = sum(geometry(tensor).numel for tensor in tensors if not isinstance(tensor, RandomTensor))
    return read >= WORTH_PROCESSES


def _ahead(begun: Iterable[Future[R]], count: int) -> Iterator[R]:
    """Their results in their order, while `count` more than are asked for are under way."""
    under_way: deque[Future[R]] = deque()
    for future in begun:
        under_way.append(future)
        if len(under_way) > count:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _after(ready: Future[None], surveys: Iterator[Survey]) -> Iterator[Survey]:
    for found in surveys:
        ready.result()
        yield found


def _measure(found: Survey, schemes: Sequence[Scheme], left: Event) -> TensorReport:
    from .measure import measure

    return measure(replace(found, tensor=_Leavable(found.tensor, left)), schemes)


def _import_libraries(schemes: Sequence[Scheme], then: Callable[[], object]) -> None:
    """Import what measures: what bitsandbytes has compiled for each new shape is sooner done as it is written."""
    from ..library_logs import quiet_loggers
    from ..prediction.libraries_loading import libraries_loading

    quiet_loggers()
    with libraries_loading():
        import torch

        torch.set_num_threads(1)  # tensors are measured side by side
        for package in {scheme.package for scheme in schemes}:
            importlib.import_module(package)
    then()


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

    def glimpse(self) -> Bits:
        return self.tensor.glimpse()

    def runs(self, indices: NDArray[np.int64]) -> Bits:
        return self.tensor.runs(indices)
