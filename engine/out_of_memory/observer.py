"""The CUDA allocator's own observer: who is told, on the allocating thread, that memory has run out.

PyTorch can attach one and never detach it. So one is attached for the whole
process, holds nothing, and does nothing while nobody listens. It is called
when the allocator has freed what it could, without its lock, before the error
is raised: no frame has been left by then. Nothing in here may raise, and no
CUDA work may be done.
"""

from __future__ import annotations

import _thread
import logging
import threading
from collections.abc import Callable

import torch

log = logging.getLogger("gpumem_tui.out_of_memory")

Listener = Callable[[int, int, int], None]
"""Is told of the bytes that are taken from the device for what was asked, of those that torch may have in all
(the device's, or its limit), and of those that are free."""

_listeners: dict[int, Listener] = {}
_attached = False
_attaching = threading.Lock()


def listen(device_index: int, listener: Listener) -> Callable[[], None]:
    """Be told of every allocation refused on a device from now on, instead of whoever was told before.

    Args:
        device_index: Of the CUDA device, which has been initialized.
        listener: Told.

    Returns:
        What ends it.
    """
    global _attached  # noqa: PLW0603 (it is the process's)
    with _attaching:
        if not _attached:
            torch._C._cuda_attach_out_of_memory_observer(_observe)  # type: ignore[attr-defined, unused-ignore]
            _attached = True
    _listeners[device_index] = listener

    def end() -> None:
        if _listeners.get(device_index) is listener:
            del _listeners[device_index]

    return end


def _observe(device_index: int, needed_bytes: int, allowed_bytes: int, free_bytes: int) -> None:
    listener = _listeners.get(device_index)
    if listener is None:
        return
    try:
        listener(needed_bytes, allowed_bytes, free_bytes)
    except KeyboardInterrupt:  # the user's, who happened to strike now: it is raised again where it may be
        _thread.interrupt_main()
    except BaseException:
        log.warning("gpumem-tui: what ran out of memory could not be looked at", exc_info=True)
