"""DeepSpeed's ZeRO stage 3 on the modelled device, by the rules of DeepSpeed 0.19.8; it need not be installed.

    init      every parameter is partitioned; the parts of the trained ones go into one flat tensor, of which the
              optimizer steps a float32 copy. A bucket and a flat tensor for gradients are there from the beginning
    forward   `Coordinator` gathers and frees parameters, told by hooks of every module; `linear` is a function that
    backward  keeps its weight. Gradients are copied into the bucket, reduced when it is full, and added to their part
    step      everything that is gathered is freed; `sub_group_size` elements of the part at a time are stepped;
              persistent parameters are gathered again

(deepspeed/runtime/zero/stage3.py, parameter_offload.py, linear.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ..categories import Category
from ..config import UserError
from ..tracing import zero
from ..tracing.owners import Owned
from .fake_coordinator import Coordinator, Limits
from .fake_partitions import Partition, gather_now
from .fake_zero3_hooks import ModuleHooks
from .fake_zero_engine import FakeZeroEngine, FakeZeroOptimizer

REDUCE_BUCKET, PREFETCH_BUCKET, PERSISTENCE = 500_000_000, 50_000_000, 100_000
LIVE_PARAMETERS = REUSE_DISTANCE = SUB_GROUP = 1_000_000_000
"""DeepSpeed's defaults, in elements."""
NORM_DTYPE = torch.float64
NORM_PIECE = 250_000_000
HOST = torch.device("cpu")
MIXTURES = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
"""Modules whose parameters DeepSpeed gathers all at once."""

Note = Callable[[Iterable[Owned]], None]


class FakeZero3Engine(FakeZeroEngine):
    """Stands in for the engine that `deepspeed.initialize` returns, of stage 3.

    Args:
        model: Its parameters are partitioned in place.
        optimizer: Of torch's, over them.
        settings: DeepSpeed's configuration.
        dtype: Of the weights.
        ranks: Of the job.
        rank: Which of them this is.
        note: Told of buffers whose owner is known.

    Raises:
        UserError: The model has modules that DeepSpeed treats as one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        ranks: int,
        rank: int,
        note: Note,
    ) -> None:
        if mixtures := {type(module).__name__ for module in model.modules()} & {*MIXTURES}:
            raise UserError(f"parallel=zero3: how {mixtures.pop()} is gathered cannot be predicted")
        partitioned = _Stage3(model, optimizer, settings["zero_optimization"], dtype, ranks, rank, note)
        super().__init__(model, partitioned, settings)
        self._coordinator, self._hooks = partitioned.coordinator, ModuleHooks(model, partitioned)

    def __call__(self, **batch: Any) -> Any:
        """Run the model."""
        with self._hooks.in_forward():
            return super().__call__(**batch)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        """Run the backward pass, reduce what is left in the bucket, and free what is still gathered."""
        super().backward(loss, scale_wrt_gas)
        self._coordinator.release_leftovers()

    def destroy(self) -> None:
        """Take the hooks off the model."""
        self._hooks.remove()
        super().destroy()


class _Stage3(FakeZeroOptimizer):
    """The ZeRO optimizer of stage 3.

    Args:
        model: Its parameters are partitioned in place.
        optimizer: Of torch's, over those that are trained.
        settings: Of ZeRO, from DeepSpeed's configuration.
        dtype: Of the weights.
        ranks: Of the job.
        rank: Which of them this is.
        note: Told of buffers whose owner is known.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        ranks: int,
        rank: int,
        note: Note,
    ) -> None:
        self.module, self.optimizer, self.is_last = model, optimizer, False
        self._dtype, self._note, self._rank = dtype, note, rank
        self._capacity = int(settings.get("reduce_bucket_size", REDUCE_BUCKET))
        self._offload = "offload_optimizer" in settings
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = trained[0].device
        self._home = HOST if self._offload else self._device
        home = HOST if "offload_param" in settings else self._device
        persistence = int(settings.get("stage3_param_persistence_threshold", PERSISTENCE))
        self.partitions = {
            id(p): Partition(p, number, ranks, home, p.numel() <= persistence)
            for number, p in enumerate(model.parameters())
        }
        self._trained = [self.partitions[id(p)] for p in trained]
        self._used = {
            id(module): [self.partitions[id(p)] for p in module.parameters(recurse=False)] for module in model.modules()
        }
        gathers, self._reduces = torch.cpu.Stream(), torch.cpu.Stream()
        self.coordinator = Coordinator(
            self.used_by, _limits(settings), lambda: torch.cpu.stream(gathers), self._tell_gathered
        )
        self.inf_or_nan_tracker = torch.zeros(1, dtype=torch.bool, device=self._home)
        self._make_flat(home, int(settings.get("sub_group_size", SUB_GROUP)))
        bucket = torch.empty(self._capacity, dtype=dtype, device=self._device)
        self.ipg_buckets = {dtype: SimpleNamespace(buffer=bucket)}
        self._filling: list[Partition] = []
        self._filled = 0
        share = sum(each.share for each in self._trained)
        self.grad_partitions_flat_buffer = _zeros(share, dtype, self._home)
        self.norm_for_param_grads: dict[int, torch.Tensor] = {}
        for each in self._trained:
            gather_now([each])
            each.free()
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in trained]
        zero.optimizer_in(self)

    def used_by(self, module: torch.nn.Module) -> list[Partition]:
        """Parameters of a module itself, and of others if it has been seen to use them."""
        return self._used[id(module)]

    def uses(self, module: torch.nn.Module, partition: Partition) -> None:
        """A module has been seen to use another's parameter."""
        self._used[id(module)].append(partition)

    # --- init ---------------------------------------------------------------

    def _make_flat(self, home: torch.device, sub_group: int) -> None:
        """Put the parts of trained parameters into one tensor, and make float32 copies of its groups."""
        for each in self._trained:
            each.part = torch.empty(0, dtype=self._dtype, device=home)
        torch.cuda.empty_cache()
        flat, at = _zeros(sum(each.share for each in self._trained), self._dtype, home), 0
        for each in self._trained:
            each.part = flat.narrow(0, at, each.share)
            at += each.share
        self.fp16_groups: list[list[torch.nn.Parameter]] = []
        self._group_of: list[dict[str, Any]] = []
        shares = []
        for group in self.optimizer.param_groups:
            for some in _sub_groups([self.partitions[id(p)] for p in group["params"]], sub_group):
                self.fp16_groups.append([each.parameter for each in some])
                self._group_of.append(group)
                shares.append(sum(each.share for each in some))
            group["params"] = []
        self.fp16_partitioned_groups_flat = [*flat.split(shares)]
        self.fp32_partitioned_groups_flat = [self._master(part) for part in self.fp16_partitioned_groups_flat]
        if self._offload:
            for master in self.fp32_partitioned_groups_flat:
                master.grad = _zeros(master.numel(), torch.float32, HOST)
        else:
            torch.zeros(max(shares), dtype=torch.float32, device=self._device)  # gradients of a step that is not done

    def _master(self, part: torch.Tensor) -> torch.nn.Parameter:
        if part.dtype is torch.float32 and part.device == self._home:
            return torch.nn.Parameter(part)
        return torch.nn.Parameter(part.to(self._home, torch.float32).clone())

    def _tell_gathered(self, partitions: Iterable[Partition], flat: Iterable[torch.Tensor]) -> None:
        self._note(self._gathered(partitions, flat))

    @staticmethod
    def _gathered(partitions: Iterable[Partition], flat: Iterable[torch.Tensor]) -> Iterator[Owned]:
        yield from zero.gathered(each.parameter for each in partitions)
        yield from ((Category.GATHERED, "all_gather_output", tensor) for tensor in flat)

    # --- backward -----------------------------------------------------------

    def _ready(self, parameter: Any) -> None:
        """A gradient is there: copy it into the bucket, unless it is larger than that."""
        each = self.partitions[id(parameter)]
        self._note(zero.gradient_of(self, parameter))
        if self._filling and self._filled + each.numel > self._capacity:
            self._reduce()
        if self._filled + each.numel <= self._capacity:
            place = self.ipg_buckets[self._dtype].buffer.narrow(0, self._filled, each.numel)
            parameter.grad.data = place.view(each.shape)
        self._filling.append(each)
        self._filled += each.numel

    def _reduce(self) -> None:
        """Reduce-scatter the gradients in the bucket and add each to its part."""
        filling = sorted(self._filling, key=lambda each: each.number)
        self._filling.clear()
        self._filled = 0
        if not filling:
            return
        with torch.cpu.stream(self._reduces):
            interleaved = self._interleaved(filling)
            on_gpu = None
            for each in filling:
                begin = each.share * self._rank
                if self._offload and begin < each.numel:
                    on_gpu = self._empty(min(each.share, each.numel - begin), self._dtype)
                    if self.is_last:
                        self._send_to_host(each, on_gpu)
                each.parameter.grad = None
            del interleaved, on_gpu

    def _interleaved(self, filling: list[Partition]) -> torch.Tensor | None:
        """Gradients by the rank that they are for, each padded; one that needs no padding is reduced where it is."""
        ranks = filling[0].ranks
        if len(filling) == 1 and filling[0].share * ranks == filling[0].numel:
            return None
        lacking = (
            each.share - min(each.share, max(0, each.numel - each.share * rank))
            for rank in range(ranks)
            for each in filling
            if each.share * ranks > each.numel
        )
        padding = [self._empty(numel, self._dtype) for numel in lacking if numel]
        interleaved = self._empty(sum(each.share for each in filling) * ranks, self._dtype)
        del padding
        return interleaved

    def _send_to_host(self, partition: Partition, gradient: torch.Tensor) -> None:
        for piece in gradient.split(NORM_PIECE):
            piece.to(NORM_DTYPE)
        self.norm_for_param_grads[partition.number] = self._empty(1, NORM_DTYPE)
        gradient.to(torch.float32)

    def _empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    def reduce_rest(self) -> None:
        """Reduce what is left once backward has ended."""
        self._reduce()

    # --- step ---------------------------------------------------------------

    def step(self) -> None:
        """Free what is gathered; norms; then for each group of parts its float32 gradients and the optimizer's step."""
        self.coordinator.release_all(self.partitions.values())
        if self._dtype is torch.float16:
            for look in (torch.isinf, torch.isnan):
                look(self.grad_partitions_flat_buffer).any()
        if not self._offload:
            norms = [self._norm_of(each) for each in self._trained]
            del norms
        self._global_grad_norm = self._empty(1, NORM_DTYPE)
        for master, group, params in zip(
            self.fp32_partitioned_groups_flat, self._group_of, self.fp16_groups, strict=True
        ):
            if not self._offload:
                master.grad = self._flattened(params).to(torch.float32)
                self._note(zero.for_now())
            group["params"] = [master]
            self.optimizer.step()
            group["params"] = []
            if not self._offload:
                master.grad = None
        self.norm_for_param_grads.clear()
        gather_now([each for each in self.partitions.values() if each.persistent])
        self._tell_gathered((each for each in self.partitions.values() if each.persistent), ())

    def _norm_of(self, partition: Partition) -> torch.Tensor:
        self._empty(partition.share, NORM_DTYPE)
        return self._empty(1, NORM_DTYPE)

    def _flattened(self, params: list[torch.nn.Parameter]) -> torch.Tensor:
        """The gradients of a group: a copy, unless they are of one parameter."""
        shares = [self.partitions[id(p)].share for p in params]
        if len(shares) > 1:
            return self._empty(sum(shares), self._dtype)
        return self.grad_partitions_flat_buffer.narrow(0, 0, shares[0])


def _limits(settings: Mapping[str, Any]) -> Limits:
    return Limits(
        int(settings.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)),
        int(settings.get("stage3_max_live_parameters", LIVE_PARAMETERS)),
        int(settings.get("stage3_max_reuse_distance", REUSE_DISTANCE)),
    )


def _sub_groups(partitions: list[Partition], most: int) -> Iterator[list[Partition]]:
    """Parts in groups: one is full as soon as it has so many elements."""
    group: list[Partition] = []
    for each in partitions:
        group.append(each)
        if sum(one.share for one in group) >= most or each is partitions[-1]:
            yield group
            group = []


def _zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer; on the host it is pinned."""
    return torch.zeros(numel, dtype=dtype, device=device, pin_memory=device == HOST)
