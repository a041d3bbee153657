"""The line that says which package is missing and how it is installed; one place spells it."""

from __future__ import annotations


def install(target: str) -> str:
    """The command that installs a package, or `gpumem-tui[EXTRA]`, so that a shell takes the brackets as they are."""
    return f"pip install '{target}'" if "[" in target else f"pip install {target}"


def not_installed(package: str, extra: str = "") -> str:
    """`the package torchao is not installed: pip install 'gpumem-tui[torchao]'`.

    Args:
        package: As it is called on PyPI.
        extra: Of this project, that brings it in a version that works; empty: it is in none.
    """
    return f"the package {package} is not installed: {install(f'gpumem-tui[{extra}]' if extra else package)}"
