"""DeepSpeed's ZeRO on the modelled device, by the rules of DeepSpeed 0.19.8; it need not be installed.

    init      all trained weights go into one flat tensor, aligned to 2 x ranks; a float32 copy of this
              rank's partition of it is what the optimizer steps
    backward  a bucket of `reduce_bucket_size` elements; gradients are copied into it until it is full, and
              are then reduced. Stage 2 does so as they come, stage 1 when all are there. Those of this
              rank's partition are kept in a tensor of their own
    step      the partition's gradients are flattened and made float32; the optimizer steps

(deepspeed/runtime/zero/stage_1_and_2.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from ..parallelism import Wrapped
from ..parallelism.zero import ZeRO
from ..tracing import zero
from ..tracing.owners import Owned
from .fake_zero3 import FakeZero3Engine
from .fake_zero_engine import FakeZeroEngine, FakeZeroOptimizer

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`."""
ALIGNMENT = 2
"""Elements that a partition is a multiple of."""
NORM_DTYPE = torch.float64
HOST = torch.device("cpu")

Note = Callable[[Iterable[Owned]], None]


class FakeZeRO(ZeRO):
    """Stands in for DeepSpeed.

    Args:
        settings: DeepSpeed's configuration.
        note: Told of buffers whose owner is known.
    """

    def __init__(self, settings: Mapping[str, Any], note: Note) -> None:
        super().__init__(settings)
        self._told = note

    @property
    def stage(self) -> int:
        """The stage of ZeRO: 1, 2 or 3."""
        return int(self.settings["zero_optimization"]["stage"])

    def wrap(self, model: Any, device: torch.device, make: Callable[[], torch.optim.Optimizer]) -> Wrapped:
        """Partition the model.

        Raises:
            UserError: Stage 3 treats a module of it in a way that is not modelled.
        """
        dtype = next((d for name, d in _DTYPES.items() if self.settings[name]["enabled"]), torch.float32)
        for parameter in model.parameters():  # buffers stay as they are
            parameter.data = parameter.data.to(dtype)
        job = (dtype, dist.get_world_size(), dist.get_rank(), self._told)
        if self.stage == 3:
            engine: FakeZeroEngine = FakeZero3Engine(model, make(), self.settings, *job)
        else:
            optimizer = _Partitioned(make(), self.settings["zero_optimization"], *job)
            engine = FakeZeroEngine(model, optimizer, self.settings)
        return Wrapped(engine, engine.optimizer)

    def close(self, call: Any) -> None:
        """Take its hooks off the model."""
        call.destroy()


class _Partitioned(FakeZeroOptimizer):
    """The ZeRO optimizer of stage 1 or 2: the parameters become views of a flat tensor."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        ranks: int,
        rank: int,
        note: Note,
    ) -> None:
        self.optimizer, self.is_last = optimizer, False
        self._dtype, self._note = dtype, note
        self._as_they_come = settings["stage"] == 2
        self._capacity = int(settings.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
        self._offload = "offload_optimizer" in settings
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = params[0].device
        self.bit16_groups = [params]
        self._size = _aligned(sum(p.numel() for p in params), ALIGNMENT * ranks) // ranks
        self._begin, self._is_last_rank = self._size * rank, rank == ranks - 1
        self._ranks_of = {id(p): ranges for p, ranges in self._ranges(params)}
        self._in_partition = [p for p in params if rank in dict(self._ranks_of[id(p)])]
        self._rank = rank
        self.bit16_groups_flat = [self._flattened(params, self._size * ranks)]
        self.single_partition_of_fp32_groups = [self._master()]
        self.ipg_buckets = {dtype: SimpleNamespace(buffer=[])}
        self.averaged_gradients: dict[int, list[torch.Tensor]] = {}
        self.all_grad_tensors: dict[int, list[torch.Tensor]] = {}
        self.grads_in_partition: torch.Tensor | None = None
        self._filled = self._offset = 0
        self._waiting: list[torch.nn.Parameter] = []
        if self._offload:
            largest = max(p.numel() for p in params)
            self.temp_grad_buffer_for_gpu_offload = torch.zeros(largest, dtype=dtype, device=self._device)
        for group in optimizer.param_groups:
            group["params"] = self.single_partition_of_fp32_groups
        zero.optimizer_in(self)
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in params]

    def _ranges(self, params: list[torch.nn.Parameter]) -> Iterator[tuple[torch.nn.Parameter, list[tuple[int, int]]]]:
        """Each parameter with the ranks in whose partitions it lies, and how many elements in each."""
        at = 0
        for p in params:
            end = at + p.numel()
            first, last = at // self._size, (end - 1) // self._size
            yield p, [(r, min(end, (r + 1) * self._size) - max(at, r * self._size)) for r in range(first, last + 1)]
            at = end

    def _flattened(self, params: list[torch.nn.Parameter], numel: int) -> torch.Tensor:
        flat, at = torch.empty(numel, dtype=self._dtype, device=self._device), 0
        for p in params:
            p.data = flat.narrow(0, at, p.numel()).view(p.shape)
            at += p.numel()
        return flat

    def _master(self) -> torch.nn.Parameter:
        """This rank's partition in float32, and for a moment its gradient."""
        partition = torch.empty(self._size, dtype=self._dtype, device=self._device)
        master = partition.to(HOST if self._offload else self._device, torch.float32)
        del partition
        torch.zeros(self._size, dtype=torch.float32, device=master.device)
        return torch.nn.Parameter(master)

    # --- backward -----------------------------------------------------------

    def _ready(self, parameter: torch.Tensor) -> None:
        """A gradient is there."""
        bucket = self.ipg_buckets[self._dtype]
        if not bucket.buffer:
            bucket.buffer.append(torch.empty(self._capacity, dtype=self._dtype, device=self._device))
            self._note(zero.for_now())
        if self._as_they_come:
            self._collect(parameter)

    def _collect(self, parameter: Any) -> None:
        """Copy a gradient into the bucket; one that is larger than the bucket waits alone."""
        if self._filled + parameter.numel() > self._capacity:
            self._reduce()
        if parameter.numel() <= self._capacity:
            place = self.ipg_buckets[self._dtype].buffer[0].narrow(0, self._filled, parameter.numel())
            parameter.grad = place.view(parameter.shape)
        self._filled += parameter.numel()
        self._waiting.append(parameter)

    def _reduce(self) -> None:
        """All-reduce the bucket: where it is of several partitions, in a flat copy; then keep this rank's part."""
        parts = [r for p in self._waiting for r, _ in self._ranks_of[id(p)]]
        slices = sum(one != before for one, before in zip(parts, [-1, *parts], strict=False))
        if slices > 1:
            torch.empty(self._filled, dtype=self._dtype, device=self._device)
        for p in self._waiting:
            if self._rank in dict(self._ranks_of[id(p)]):
                self._keep(p)
            elif self._as_they_come:
                p.grad = None
        self._waiting.clear()
        self._filled = 0

    def _keep(self, parameter: torch.nn.Parameter) -> None:
        if self._offload:
            if self.is_last:
                parameter.grad.to(NORM_DTYPE)  # type: ignore[union-attr]  # for its norm
                parameter.grad.to(torch.float32)  # type: ignore[union-attr]  # which goes to the host
                parameter.grad = None
            return
        if self.grads_in_partition is None:
            total = sum(p.numel() for p in self._in_partition)
            self.grads_in_partition, self._offset = torch.empty(total, dtype=self._dtype, device=self._device), 0
            self._note(zero.for_now())
        place = self.grads_in_partition.narrow(0, self._offset, parameter.numel())
        parameter.grad = place.view(parameter.shape)
        self._offset += parameter.numel()

    def reduce_rest(self) -> None:
        """Reduce what is left once backward has ended; stage 1 does nothing before the last micro-batch."""
        if not self._as_they_come:
            if not self.is_last:
                return
            for p in self.bit16_groups[0]:
                if p.grad is not None:
                    self._collect(p)
        self._reduce()
        if not self._offload:
            fresh = [p.grad for p in self._in_partition if p.grad is not None]
            kept = self.all_grad_tensors.setdefault(0, fresh)
            if self.is_last:
                missing = self._size - self._elements_in_partition()
                padding = [torch.zeros(missing, dtype=self._dtype, device=self._device)] if missing else []
                self.averaged_gradients[0] = [*kept, *padding]
                self.all_grad_tensors.clear()
        self.ipg_buckets[self._dtype].buffer.clear()
        self.grads_in_partition = None
        for p in self.bit16_groups[0]:
            p.grad = None
        self._note(zero.for_now())

    def _elements_in_partition(self) -> int:
        return sum(dict(self._ranks_of[id(p)])[self._rank] for p in self._in_partition)

    # --- step ---------------------------------------------------------------

    def step(self) -> None:
        """Norm, float32 gradients of this rank's partition, the optimizer's own step."""
        master = self.single_partition_of_fp32_groups[0]
        if self._offload:
            master.grad = torch.zeros(self._size, dtype=torch.float32, device=master.device)
        else:
            sizes = [dict(self._ranks_of[id(p)])[self._rank] for p in self._in_partition]
            for numel in sizes:
                torch.empty(numel, dtype=NORM_DTYPE, device=self._device)
            parts = self.averaged_gradients.pop(0)
            several = len(parts) > 1
            whole = torch.empty(self._size, dtype=self._dtype, device=self._device) if several else parts[0].view(-1)
            flat = whole.narrow(0, 0, self._size)  # the one parameter may go on in other ranks' partitions
            master.grad = flat.to(torch.float32)
            del whole, flat, parts
            self._note(zero.for_now())
        self.optimizer.step()
        master.grad = None


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _aligned(count: int, alignment: int) -> int:
    return math.ceil(count / alignment) * alignment
