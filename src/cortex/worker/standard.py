"""The names of the modules that belong to Python itself."""

from __future__ import annotations

import os
import sys


def _listed() -> frozenset[str]:
    """By the files that there are: before 3.10 Python does not tell them."""
    folder = os.path.dirname(os.__file__)
    files = os.listdir(folder)
    extensions = os.path.join(folder, "lib-dynload")
    if os.path.isdir(extensions):
        files += os.listdir(extensions)
    return frozenset(sys.builtin_module_names) | {name.partition(".")[0] for name in files}


NAMES: frozenset[str] = getattr(sys, "stdlib_module_names", None) or _listed()
