"""What belongs to Python itself, as it was before any code of a user's ran: the names of its modules, and its builtins."""

from __future__ import annotations

import builtins
import os
import sys

BUILTINS = dict(vars(builtins))
"""A task may change those of all modules. What runs after it has these for its `__builtins__`, set before its functions
are made: they keep what their module had then."""


def _listed() -> frozenset[str]:
    """By the files that there are: before 3.10 Python does not tell them."""
    folder = os.path.dirname(os.__file__)
    files = os.listdir(folder)
    extensions = os.path.join(folder, "lib-dynload")
    if os.path.isdir(extensions):
        files += os.listdir(extensions)
    return frozenset(sys.builtin_module_names) | {name.partition(".")[0] for name in files}


NAMES: frozenset[str] = getattr(sys, "stdlib_module_names", None) or _listed()
