"""Loaded by every Python that `gpumem-tui exec` starts, before the script; then the site's own, if there is one."""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_here = str(Path(__file__).parent)
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if p and p != _here])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))

try:
    from gpumem_tui.engine.watch.auto_attach import wait_for_torch
except ImportError:  # another environment than the one that gpumem-tui is installed in
    sys.stderr.write(
        f"gpumem-tui: not installed for {sys.executable}, which is not watched: activate the environment it is "
        f"installed in, or give that python: {os.environ.get('GPUMEM_PYTHON', 'bin/python of that environment')}\n"
    )
except Exception as error:  # no descriptor left to read it with
    sys.stderr.write(f"gpumem-tui: {sys.executable} is not watched: {error}\n")
else:
    wait_for_torch()
