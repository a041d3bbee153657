"""When ZeRO stage 3 gathers parameters and when it lets go of them, by the rules of DeepSpeed's coordinator.

    recording  the first forward and backward: a module's parameters are gathered before it computes and freed after
    complete   from then on the order of modules is known: the next `prefetch_bucket_size` elements are gathered ahead,
               unless more than `max_live_parameters` are there; what is used again within `max_reuse_distance`
               elements stays, and so does what is persistent
    invalid    modules came in another order: it begins again

(deepspeed/runtime/zero/partitioned_param_coordinator.py)
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from enum import Enum, auto
from typing import Any, NamedTuple

import torch

from .fake_partitions import Gathering, Partition, Status

NEVER_FETCHED = -(10**10)


class Limits(NamedTuple):
    """Elements.

    Attributes:
        prefetch: Gathered ahead.
        live: Beyond which nothing more is gathered ahead.
        reuse: Until its next use, within which a parameter stays.
    """

    prefetch: int
    live: int
    reuse: int


class Trace(Enum):
    """Knowledge of the order of modules."""

    RECORD = auto()
    COMPLETE = auto()
    INVALID = auto()


class Use(NamedTuple):
    """A parameter in the order of a recorded pass, and the number of the module in it that uses it."""

    partition: Partition
    step: int


class Coordinator:
    """Gathers and frees the parameters of modules.

    Args:
        of: The parameters of a module itself, and those of others that it is known to use.
        limits: See `Limits`.
        stream: Enters the stream on which it gathers.
        gathered: Told of tensors that have just been gathered.
    """

    def __init__(
        self,
        of: Callable[[torch.nn.Module], list[Partition]],
        limits: Limits,
        stream: Callable[[], AbstractContextManager[Any]],
        gathered: Callable[[Iterable[Partition], Iterable[torch.Tensor]], None],
    ) -> None:
        self._of, self._limits, self._stream, self._gathered = of, limits, stream, gathered
        self._trace = Trace.INVALID
        self._modules: list[torch.nn.Module] = []
        self._uses: list[Use] = []
        self._before: list[int] = []  # elements of all modules before a step
        self._steps_of: dict[Partition, list[int]] = {}
        self._queue: deque[Use] = deque()
        self._in_flight: dict[Partition, Gathering] = {}
        self._in_backward: dict[int, torch.nn.Module] = {}
        self._recomputed: dict[int, set[Partition]] = {}
        self._released: dict[tuple[int, int], frozenset[Partition]] = {}
        self._fetched_for: dict[Partition, int] = {}
        self._step = self._live = 0

    # --- order ---------------------------------------------------------------------

    def begin(self) -> None:
        """The model's forward pass begins."""
        self._settle()
        if self._trace is Trace.RECORD:
            self._complete()
        elif self._trace is Trace.INVALID:
            self._trace = Trace.RECORD
        self._queue = deque(self._uses)
        self._fetched_for.clear()
        self._step = self._live = 0

    def _complete(self) -> None:
        """All modules of a pass are known, and so is how far away each next use of a parameter is."""
        self._uses, self._before, self._steps_of = [], [0], {}
        for step, module in enumerate(self._modules):
            partitions = sorted(set(self._of(module)), key=_number)
            self._uses += (Use(each, step) for each in partitions)
            self._before.append(self._before[-1] + sum(each.numel for each in partitions))
            for each in partitions:
                self._steps_of.setdefault(each, []).append(step)
        self._trace = Trace.COMPLETE

    def _reached(self, module: torch.nn.Module) -> None:
        """A module is next: note it, or see whether it is the one that was expected."""
        if self._trace is Trace.COMPLETE and self._modules[self._step : self._step + 1] != [module]:
            self._trace = Trace.INVALID
            self._modules, self._uses = [], []
            self._queue.clear()
            self._fetched_for.clear()
            self._settle()
        if self._trace is Trace.RECORD:
            self._modules.append(module)

    def _settle(self) -> None:
        """Wait for all that is in flight, and free it."""
        for partition, gathering in [*self._in_flight.items()]:
            gathering.wait()
            self._free(partition)
        self._in_flight.clear()

    # --- fetching ------------------------------------------------------------------

    def fetch(self, module: torch.nn.Module, forward: bool) -> None:
        """Have a module's parameters, and begin to gather those of the next."""
        self._reached(module)
        partitions = sorted(set(self._of(module)), key=_number)
        if not forward:
            self._in_backward[id(module)] = module
        self._gather(partitions)
        arrived = []
        recomputing = forward and torch._C._current_graph_task_id() != -1
        for each in partitions:
            each.used_by.add(id(module))
            if recomputing and self._in_backward and not each.parameter.requires_grad:
                owner = next(reversed(self._in_backward))
                self._recomputed.setdefault(owner, set()).add(each)
                each.used_by.add(owner)
            if each in self._in_flight:
                with self._stream():
                    self._in_flight.pop(each).wait()
                arrived.append(each)
        if arrived:
            self._gathered(arrived, ())
        if self._trace is Trace.COMPLETE:
            self._prefetch(partitions)
        self._step += 1

    def _prefetch(self, partitions: list[Partition]) -> None:
        """Take what is fetched off the queue, and gather what comes behind it."""
        fresh = {each for each in partitions if self._fetched_for.get(each, NEVER_FETCHED) < self._step}
        while self._queue and fresh:
            use = self._queue.popleft()
            self._fetched_for[use.partition] = use.step
            fresh.discard(use.partition)
        if not self._limits.prefetch:
            return
        most = min(self._limits.live - self._live, self._limits.prefetch)
        ahead: dict[Partition, None] = {}
        elements = 0
        while self._queue and elements < most:
            use = self._queue.popleft()
            each = use.partition
            self._fetched_for[each] = max(self._fetched_for.get(each, NEVER_FETCHED), use.step)
            if each.status is Status.PARTITIONED and each not in ahead:
                ahead[each] = None
                elements += each.numel
        self._gather(ahead)

    def _gather(self, partitions: Iterable[Partition]) -> None:
        missing = [each for each in partitions if each.status is Status.PARTITIONED]
        if not sum(each.share for each in missing):
            return
        self._live += sum(each.numel for each in missing)
        with self._stream():
            gathering = Gathering(missing)
        self._in_flight |= dict.fromkeys(missing, gathering)
        self._gathered(missing, gathering.flat)

    # --- freeing -------------------------------------------------------------------

    def release(self, module: torch.nn.Module, forward: bool) -> None:
        """A module has computed: free what is not used again soon."""
        own = set(self._of(module))
        released: set[Partition] = set(self._to_release(module) if self._trace is Trace.COMPLETE else own)
        if not forward:
            again = self._recomputed.pop(id(module), set())
            released |= {each for each in again if not each.persistent}
            own |= again
            self._in_backward.pop(id(module), None)
        for each in sorted(own, key=_number):
            each.used_by.discard(id(module))
            if each in released:
                self._free(each)

    def _to_release(self, module: torch.nn.Module) -> frozenset[Partition]:
        """Parameters that a module's end frees; decided the first time that it ends there, and then for good."""
        key = id(module), self._step
        if key not in self._released:
            self._released[key] = frozenset(each for each in self._of(module) if not self._stays(each))
        return self._released[key]

    def _stays(self, partition: Partition) -> bool:
        """True if the next use of a parameter was passed over because it is there, or is near."""
        if partition.persistent or self._fetched_for.get(partition, NEVER_FETCHED) > self._step:
            return True
        steps = self._steps_of.get(partition, [])
        following = bisect_left(steps, self._step)
        if following == len(steps):
            return False
        return self._before[steps[following]] - self._before[self._step] < self._limits.reuse

    def release_leftovers(self) -> None:
        """Backward has ended: free what modules hold whose inputs have no gradient, and so whose end was not seen."""
        while self._in_backward:
            key, module = self._in_backward.popitem()
            for each in {*self._of(module), *self._recomputed.pop(key, ())}:
                each.used_by.discard(key)
                if not each.persistent:
                    self._free(each)

    def release_all(self, partitions: Iterable[Partition]) -> None:
        """The optimizer is about to step: free everything."""
        for each in partitions:
            if each in self._in_flight:
                self._in_flight.pop(each).wait()
            each.used_by.clear()
            self._free(each)

    def _free(self, partition: Partition) -> None:
        if partition.status is Status.AVAILABLE and not partition.used_by:
            partition.free()
            self._live -= partition.numel


def _number(partition: Partition) -> int:
    return partition.number
