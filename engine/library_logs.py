"""Libraries kept from the terminal, which is the app's."""

from __future__ import annotations

import warnings
from logging import ERROR, getLogger


def quiet_loggers() -> None:
    """Keep to themselves what libraries log; takes effect if it comes before they are imported."""
    # bitsandbytes warns at every call of an int8 layer; torchao, which transformers imports
    # where it is installed, of kernels it could not load.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        getLogger(name).setLevel(ERROR)


def quiet_libraries() -> None:
    """Keep progress bars and advice off the terminal."""
    quiet_loggers()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT still uses names that newer transformers call deprecated: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
