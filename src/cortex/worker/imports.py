"""What modules a task's file imports at its top, and the user's own ones that it reaches: read, not run.
Called by `preload` in a process of its own, because `ast` alone takes more memory than all of ours.
"""

from __future__ import annotations

import ast
import os
from importlib.machinery import ModuleSpec, PathFinder

_MOST_FILES = 200


def found(path: str, roots: list[str]) -> list[tuple[str, list[str]]]:
    """Modules that are not the user's, with what is taken from them by name, in the order of the imports."""
    waiting, seen = [path], {path}
    modules: list[tuple[str, list[str]]] = []
    while waiting and len(seen) < _MOST_FILES:
        for name, names in _imports(waiting.pop()):
            spec = _own(name.partition(".")[0], roots)
            if spec is None:
                modules.append((name, names))
                continue
            for file in _files(name, names, roots):
                if file not in seen:
                    seen.add(file)
                    waiting.append(file)
    return modules


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
