"""Memory that the caching allocator holds free, given back while the next run is planned. Loads no torch."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class CachedMemory:
    """The cached memory of this process's device between two runs.

    Giving gigabytes back takes CUDA tens of milliseconds, in which the allocator's
    lock is held: whoever asks it anything meanwhile waits, and with the GIL everybody.
    So they ask after `settled`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cached-memory")
        self._giving: Future[None] | None = None

    def give_back(self, device: torch.device) -> None:
        """Begin to give back all of it, pinned memory of the host included; of a CPU there is none."""
        if device.type == "cuda":
            self._giving = self._thread.submit(_give_back, device)

    def settled(self) -> None:
        """Wait until it has been given back.

        Raises:
            Exception: Whatever CUDA says to it, once.
        """
        giving, self._giving = self._giving, None
        if giving is not None:
            giving.result()

    def quiet(self) -> None:
        """Wait likewise, on another thread, to whom it is nothing that CUDA has failed."""
        if (giving := self._giving) is not None:
            wait([giving])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _give_back(device: torch.device) -> None:
    import torch

    torch.cuda.set_device(device)  # of this thread
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()  # what was offloaded
