"""The program: `gpumem-tui`, or `python -m gpumem_tui.tui`."""

from __future__ import annotations

from typing import NoReturn

from . import interrupt


def program() -> NoReturn:
    """Run the command line, with Ctrl-C answered before anything else is imported."""
    interrupt.install()
    from .cli import main

    interrupt.leave(main())


if __name__ == "__main__":
    program()
