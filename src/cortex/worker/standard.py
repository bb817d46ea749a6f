"""Python's own module names and builtins, as they were before any code of a user ran."""

from __future__ import annotations

import builtins
import os
import sys

BUILTINS = dict(vars(builtins))
"""A copy of the builtins. A task may change the builtins of all modules. Modules whose code runs
after the task set this copy as their `__builtins__`, before they define functions: a function keeps
the builtins that its module had at that time."""


def names_of_files() -> frozenset[str]:
    """The names by the files of the standard library: before 3.10, Python does not list them."""
    folder = os.path.dirname(os.__file__)
    files = os.listdir(folder)
    extensions = os.path.join(folder, "lib-dynload")
    if os.path.isdir(extensions):
        files += os.listdir(extensions)
    return frozenset(sys.builtin_module_names) | {name.partition(".")[0] for name in files}


NAMES: frozenset[str] = getattr(sys, "stdlib_module_names", None) or names_of_files()
