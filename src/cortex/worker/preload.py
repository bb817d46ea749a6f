"""What a fork server imports ahead for its jobs: the third-party and standard modules that the
user's own ones import at their top. The user's own modules are imported by each job anew, so that
nothing of one job is seen by the next.
"""

from __future__ import annotations

import json
import os
import sys


def preload(path: str, roots: list[str]) -> None:
    """Import what the task file and the user's modules that it reaches import."""
    for name, names in _wanted(path, roots):
        _import(name, names)


def forget_shadowed(roots: list[str], startup: frozenset[str]) -> None:
    """Drop modules that a plain interpreter would take from the project, the user's `queue.py`
    say, and that the fork server has loaded from elsewhere for its own needs."""
    for root in roots:
        try:
            entries = os.listdir(root)
        except OSError:
            continue
        for entry in entries:
            name, _, suffix = entry.partition(".")
            is_module = suffix == "py" or suffix.endswith("so")
            if not is_module and not os.path.exists(os.path.join(root, entry, "__init__.py")):
                continue
            if name in sys.modules and name not in startup and name != "cortex":
                for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                    del sys.modules[loaded]


def _wanted(path: str, roots: list[str]) -> list[tuple[str, list[str]]]:
    """As `imports.found` tells, asked in a process of its own: what that loads is not copied by each job."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            from cortex.worker import imports

            with open(write, "wb") as pipe:
                pipe.write(json.dumps(imports.found(path, roots)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    try:
        return [(name, names) for name, names in json.loads(told)]
    except ValueError:
        return []  # it was killed: nothing is imported ahead


def _import(name: str, names: list[str]) -> None:
    if name == "__future__":
        return
    try:
        __import__(name, fromlist=[each for each in names if each != "*"])
    except BaseException:  # noqa: BLE001, RUF100  # whatever it is, the job will show it
        return
