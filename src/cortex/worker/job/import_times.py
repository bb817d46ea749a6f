"""Measures how long a job spent on imports, and of which modules. The users of the API learn from
it what `preload` would save. Called by `task` when the task's file has run.
"""

from __future__ import annotations

import sys

from cortex.worker import standard
from cortex.worker.job.interpreter_exit import names_in

globals()["__builtins__"] = standard.BUILTINS

MIN_S = 0.2
"""Shorter times are not reported."""
MAX_NAMES = 8
# Modules that have patched the standard library for all later imports, if this attribute is not
# empty.
_PATCHED = {"gevent.monkey": "saved", "eventlet.patcher": "already_patched"}


def slow_imports(took_s: float, known: frozenset[str], roots: list[str]) -> list[object] | None:
    """The seconds, and the modules that `definition.preload` should name.

    Args:
        took_s: how long it took to run the task's file.
        known: the modules that were loaded before.
        roots: the folders of the user's own modules.

    Returns:
        None if the time was spent in the user's own code, if the program would not work with these
        modules imported before its first line, or if it cannot be determined: reading attributes
        may run code of the user, which can raise.
    """
    try:
        names = _names(known, roots)
    except BaseException:  # noqa: BLE001, RUF100
        return None
    return [round(took_s, 3), names] if names else None


def _names(known: frozenset[str], roots: list[str]) -> list[str]:
    for name, attribute in _PATCHED.items():
        if names_in(sys.modules.get(name)).get(attribute):
            return []
    own = tuple(root.rstrip("/") + "/" for root in roots)
    foreign: dict[str, None] = {}  # in the order of the imports
    for name in [name for name in sys.modules if name not in known]:
        if _is_within(name, own):
            for value in list(names_in(sys.modules[name]).values()):
                found = _origin(value)
                if found is not None and found not in known and not _is_within(found, own):
                    foreign[found] = None
    names = [name for name in foreign if not _has_parent(name, foreign)]
    return names[:MAX_NAMES]


def _is_within(name: str, folders: tuple[str, ...]) -> bool:
    file = names_in(sys.modules.get(name)).get("__file__")
    is_own = isinstance(file, str) and file.startswith(folders)
    return is_own and "/site-packages/" not in str(file)


def _origin(value: object) -> str | None:
    """The module from which a program imports this object; None for the standard library."""
    is_module = issubclass(type(value), type(sys))
    name = names_in(value).get("__name__") if is_module else getattr(value, "__module__", None)
    if not isinstance(name, str) or name.partition(".")[0] in standard.NAMES:
        return None
    if name not in sys.modules:
        return None
    if is_module:
        return name
    # A class is imported from the package that exports it, not from the module that defines it.
    parts, called = name.split("."), getattr(value, "__name__", None)
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if isinstance(called, str) and getattr(sys.modules.get(package), called, None) is value:
            return package
    return name


def _has_parent(name: str, others: dict[str, None]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)
