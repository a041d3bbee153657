"""One run on the engine's thread: planned, trained, freed. Whatever happens in it becomes events.

Importing this module loads no torch: the thread does.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from .config import RunConfig, UserError, one_line
from .feed import Feed
from .publisher import GAUGE_EVERY_S, RunPublisher
from .run_events import Note, RunEnded, RunFailed
from .techniques.parallel import ranks

if TYPE_CHECKING:
    import torch

    from .cached_memory import CachedMemory
    from .peers import Peers
    from .tracing.owners import Paged
    from .tracing.recorder import Recorder
    from .train import StepResult
    from .workload import Plan


class RunLeft(BaseException):
    """Raised inside the loop to leave it: no error, and not to be caught as one."""


class TrainedRun:
    """A run from its plan to the last byte given back.

    Args:
        config: The run.
        device: The device that it has.
        recorder: The recorder of allocations on it, with nothing of a run in them.
        feed: Gets the events.
        publisher: Publishes the run, which has begun there.
        cached: Memory that the run before may still be giving back, and this one will.
        peers: The other ranks, if it is one of several.
        between: Called before every micro-batch; holds the loop while it is paused, raises `RunLeft` to end it.
        leave_if_asked: Called before every weight that is loaded; raises `RunLeft` to end the run.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        recorder: Recorder,
        feed: Feed,
        publisher: RunPublisher,
        cached: CachedMemory,
        peers: Peers | None,
        between: Callable[[], None],
        leave_if_asked: Callable[[], None],
    ) -> None:
        from .tracing.tracer import DESCRIBED, Tracer

        self._config, self._device, self._recorder = config, device, recorder
        self._feed, self._publisher, self._cached, self._peers = feed, publisher, cached, peers
        self._between, self._leave_if_asked = between, leave_if_asked
        self._managed: list[Paged] = []
        self._baseline_bytes: int | None = None
        publish_every_s = GAUGE_EVERY_S if recorder.always_on else 1.0
        described = min(DESCRIBED, config.steps or DESCRIBED)
        self._tracer = Tracer(recorder, publisher.publish_trace, publisher.recomputed, publish_every_s, described)
        publisher.attach(recorder, self._tracer, config.trace == "every")

    def train(self) -> str | None:
        """Load and train.

        Returns:
            The reason why it failed, in a line; None if it is done or was left.
        """
        import torch

        try:
            self._load_and_train()
            self._tracer.settle()
        except RunLeft:
            pass
        except UserError as error:
            self._feed.tell(RunFailed(text=str(error), mistake=True))
            return str(error)
        except torch.OutOfMemoryError as error:
            self._tracer.settle()
            self._publisher.out_of_memory(error, self._tracer.step_now, self._tracer.failed_in)
            return one_line(error)
        except Exception as error:
            self._tracer.settle()
            self._feed.tell(RunFailed(text=one_line(error), detail=traceback.format_exc()))
            return one_line(error)
        return None

    def clean_up(self, problem: str | None) -> None:
        """Give everything back, count what does not come, and tell the run's end.

        Args:
            problem: What `train` returned.
        """
        self._tracer.forget()
        if self._peers is not None and problem is None:
            self._peers.let_go(self._device)
        publisher, baseline = self._publisher, self._reach_device()
        pinned = publisher.pinned_bytes()
        self._free_all()
        managed, publisher.managed_bytes = publisher.managed_bytes, self._free_paged()
        leaked = self._recorder.allocated_bytes() - baseline + publisher.managed_bytes
        self._cached.give_back(self._device)
        self._tracer.release()
        steps, wanted = publisher.steps, self._config.steps
        reason = "failed" if problem else "stopped" if wanted == 0 or steps < wanted else "done"
        note = f", {baseline / 2**20:.1f} MiB kept by cuBLAS" if baseline else ""
        self._feed.tell(
            RunEnded(
                text=f"run {reason} after {steps} steps, {leaked} bytes leaked{note}",
                reason=reason,
                steps=steps,
                leaked_bytes=leaked,
                workspace_bytes=baseline,
                managed_bytes=managed,
                pinned_bytes=pinned,
            )
        )

    # --- before the first step --------------------------------------------------------

    def _reach_device(self) -> int:
        """Wait for the device to be as the run before has left it; returns the bytes that are allocated then."""
        self._cached.settled()
        publisher = self._publisher
        if self._baseline_bytes is None:
            self._baseline_bytes = self._recorder.allocated_bytes()
            if self._peers is not None or not publisher.context_is_known:  # of ranks, NCCL has changed as well
                publisher.measure_context()
        return self._baseline_bytes

    def _plan(self) -> Plan:
        """Everything decided, and what of it is worth a word said."""
        from .workload import prepare

        config = self._config
        self._refuse_other_ranks()
        plan = prepare(config, self._device)
        if self._peers is not None:
            plan.batches.rank, plan.batches.ranks = self._peers.rank, self._peers.size
        if 0 < plan.positions < config.row_tokens:
            text = f"{config.row_tokens} tokens in a row: the model was made for {plan.positions}"
            self._feed.tell(Note(text=text))
        return plan

    def _refuse_other_ranks(self) -> None:
        """Refuse to be fewer or more than the run is of.

        Raises:
            UserError: New processes have to be started for it.
        """
        import torch

        wanted = ranks(self._config, torch.cuda.device_count() if self._device.type == "cuda" else 0)
        there = self._peers.size if self._peers is not None else 1
        if wanted != there:
            raise UserError(f"parallel={self._config['parallel']} is of {wanted} ranks, and this engine is of {there}")

    # --- the loop ---------------------------------------------------------------------

    def _load_and_train(self) -> None:
        from .allocator_settings import applied
        from .out_of_memory.memory_limit import limited
        from .parallelism.group import grouped
        from .tracing.op_tracker import OpTracker

        # Outside the recording: importing libraries makes tensors that stay.
        plan = self._plan()
        self._reach_device()
        gc.freeze()  # so that collecting afterwards looks at what the run has made and not at the libraries
        with (
            applied(plan.recipe.allocator, self._device),
            grouped(self._config, self._device),
            limited(self._device, self._config.memory_limit_bytes),
        ):
            plan.recipe.parallelism.prepare(self._device)
            with self._recorder if isinstance(self._recorder, OpTracker) else nullcontext():
                self._loop(plan)

    def _loop(self, plan: Plan) -> None:
        from .tracing.owners import paged
        from .train import loaded, train

        began = time.perf_counter()

        def on_step(result: StepResult) -> None:
            if result.step == 1 and self._config.text("optimizer").startswith("paged"):
                self._managed = paged(workload.optimizer)
                self._publisher.managed_bytes = sum(allocation.bytes for allocation in self._managed)
                self._note_paging()
            self._publisher.stepped(result)

        with loaded(plan, self._tracer, self._leave_if_asked) as workload:
            self._publisher.loaded(workload.parameters, workload.trainable_parameters, time.perf_counter() - began)
            told = self._publisher.wants, self._between, on_step
            if self._config.generates:
                from .generate import generate

                generate(self._config, workload, self._tracer, *told)
            else:
                train(self._config, workload, self._tracer, *told)

    def _note_paging(self) -> None:
        if not self._publisher.managed_bytes:
            self._feed.tell(
                Note(text="paged optimizer: nothing was paged; bitsandbytes pages tensors of 100,000 elements or more")
            )

    # --- behind it ----------------------------------------------------------------------

    def _free_all(self) -> None:
        """Let go of all that the run has made: it is the allocator's again."""
        import torch

        from .tracing.owners import drop_library_caches

        drop_library_caches()
        # A backward pass that was left leaves what was next in a queue of this thread's, and with it the
        # graph and the model; the next pass on the thread drops it.
        torch.zeros((), requires_grad=True).backward()
        gc.collect()
        gc.unfreeze()

    def _free_paged(self) -> int:
        """Give back managed memory; returns the bytes that are still there."""
        from .tracing.owners import free_paged

        managed, self._managed = self._managed, []
        return free_paged(managed)
