"""Libraries imported for a prediction, without what they prepare for running."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_one_at_a_time = threading.RLock()


@contextmanager
def libraries_loading() -> Iterator[None]:
    """Import in two thirds of the time.

    What an import makes stays, and Python's collector would look at all of it
    again and again. bitsandbytes has some of its CPU's functions compiled when
    it is imported, for which PyTorch loads its compiler: over fake tensors they
    run as they are written. One thread at a time: what it changes is the process's.
    """
    with _one_at_a_time:
        collecting, disabled = gc.isenabled(), os.environ.get("TORCHDYNAMO_DISABLE")
        gc.disable()
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        try:
            yield
        finally:
            if collecting:
                gc.enable()
            if disabled is None:
                del os.environ["TORCHDYNAMO_DISABLE"]
            else:
                os.environ["TORCHDYNAMO_DISABLE"] = disabled
