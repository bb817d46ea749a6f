"""What a fork server imports ahead for its jobs: the third-party and standard modules that the
user's own ones import at their top. The user's own modules are imported by each job anew, so that
nothing of one job is seen by the next.
"""

from __future__ import annotations

import ast
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

_MOST_FILES = 200


def preload(path: str, roots: list[str]) -> None:
    """Import what the task file and the user's modules that it reaches import."""
    waiting, seen = [path], {path}
    while waiting and len(seen) < _MOST_FILES:
        for name, names in _imports(waiting.pop()):
            spec = _own(name.partition(".")[0], roots)
            if spec is None:
                _import(name, names)
                continue
            for file in _files(name, names, roots):
                if file not in seen:
                    seen.add(file)
                    waiting.append(file)


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


def _imports(path: str) -> list[tuple[str, list[str]]]:
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read(), path)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # the job will show it
    found: list[tuple[str, list[str]]] = []
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, (ast.Try, ast.With)) or (
            isinstance(node, ast.If) and not _never_runs(node.test)
        ):  # 3.9
            waiting += node.body
    return found


def _never_runs(test: ast.expr) -> bool:
    words = ast.dump(test)
    return "TYPE_CHECKING" in words or "__main__" in words


def _own(top: str, roots: list[str]) -> ModuleSpec | None:
    """The spec of a top-level module of the user's; None for everybody else's."""
    spec = PathFinder.find_spec(top, roots)
    if spec is not None and spec.origin is None and PathFinder.find_spec(top) is not None:
        return None  # a bare folder does not shadow a package elsewhere
    return spec


def _files(name: str, names: list[str], roots: list[str]) -> list[str]:
    """The files that `from name import names` may run."""
    parts = name.split(".")
    found = []
    for root in roots:
        stems = [os.path.join(root, *parts[: i + 1]) for i in range(len(parts))]
        stems += [os.path.join(stems[-1], each) for each in names]
        for stem in stems:
            found += [f for f in (stem + ".py", stem + "/__init__.py") if os.path.isfile(f)]
    return found


def _import(name: str, names: list[str]) -> None:
    if name == "__future__":
        return
    try:
        __import__(name, fromlist=[each for each in names if each != "*"])
    except BaseException:  # noqa: BLE001, RUF100  # whatever it is, the job will show it
        return
