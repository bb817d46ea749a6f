"""An unpacked project checked against its APIs: what can be told before a job runs, all at once.

The operator calls it at deploy. Nothing of the project is run: Python files are only parsed.
"""

from __future__ import annotations

import ast
import os
import posixpath
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from cortex.projects.requirements import read_requirements
from cortex.projects.variables import check_variables
from cortex.spec.api import Api, Definition
from cortex.spec.yaml import FieldLines, field_lines, invalid_spec
from cortex.spec.yaml_nodes import Mistake, did_you_mean, quoted

_MOST_FILES = 20_000
_LARGEST_PARSED = 4 << 20
_EVERYTHING = "*"


def check_files(apis: list[Api], project: Path, file: str, text: str) -> None:
    """Check that the project holds what its APIs name, and that its own files can be read.

    Args:
        file, text: the `cortex.yaml` that the APIs were read from, for the lines in messages.

    Raises:
        InvalidSpec: with every mistake, each with its file and line.
    """
    lines = field_lines(text)
    mistakes: list[Mistake] = []
    others: list[str] = []
    for index, api in enumerate(apis):
        definition = api.definition
        if definition.path is not None:
            line = _line(lines, index, "path")
            for told in _path_mistakes(project, definition.path):
                mistakes.append(Mistake(line, f"definition.path: {told}"))
            others += _syntax_mistakes(project, definition)
        if definition.python_path is not None:
            line = _line(lines, index, "python_path")
            for told in _folder_mistakes(project, definition.python_path):
                mistakes.append(Mistake(line, f"definition.python_path: {told}"))
        for kind, path in definition.dependencies:
            if path is not None:
                line = _line(lines, index, "dependencies", kind)
                for told in _dependency_mistakes(project, path):
                    mistakes.append(Mistake(line, f"definition.dependencies.{kind}: {told}"))
        others += read_requirements(project, definition.dependencies).mistakes
    others += check_variables(project)
    if mistakes or others:
        raise invalid_spec(file, mistakes, others)


def _line(lines: FieldLines, index: int, *name: str) -> int:
    return lines.get((index, "definition", *name), lines.get((index,), 1))


def _path_mistakes(project: Path, path: str) -> Iterator[str]:
    file = _inside(project, path)
    if file is None or not file.is_file():
        hint = _near(path, (name for name in _files(project) if name.endswith(".py")))
        found = "is a folder" if file is not None and file.is_dir() else "is not in the project"
        yield f"{quoted(path)} {found}; allowed: a Python file{hint}"
    elif file.suffix != ".py":
        yield f"found {quoted(path)}; allowed: a file whose name ends in .py (or use command)"
    else:
        yield from _task_mistakes(file, path)


def _task_mistakes(file: Path, path: str) -> Iterator[str]:
    tree = _parse(file)
    if not isinstance(tree, ast.Module):
        return
    names = set(_names(tree.body))
    if names & {"Task", "task", _EVERYTHING}:
        return
    if any(isinstance(node, ast.AsyncFunctionDef) and node.name == "task" for node in tree.body):
        yield f"the task in {quoted(path)} is async; define def task(config) and call asyncio.run"
        return
    hint = did_you_mean("Task", names)
    yield (
        f"{quoted(path)} defines neither a class Task nor a function task(config) "
        f"at its top level{hint}"
    )


def _syntax_mistakes(project: Path, definition: Definition) -> Iterator[str]:
    path = definition.path or ""
    file = _inside(project, path)
    if file is None or file.suffix != ".py" or not file.is_file():
        return
    error = _parse(file)
    wanted = read_requirements(project, definition.dependencies)
    # Another version of Python has another syntax.
    if isinstance(error, SyntaxError) and wanted.python_to_find is None:
        shown = f": {quoted(error.text.strip())}" if error.text else ""
        yield f"{posixpath.normpath(path)}:{error.lineno or 1}: {error.msg}{shown}"


def _parse(file: Path) -> ast.Module | SyntaxError | None:
    if file.stat().st_size > _LARGEST_PARSED:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(file.read_bytes())
    except SyntaxError as error:
        return error
    except ValueError as error:
        return SyntaxError(str(error))
    except (RecursionError, MemoryError):
        return None  # nested deeper than this check goes


def _names(body: list[ast.stmt]) -> Iterator[str]:
    """The names that a module's statements define, those in its ifs, tries and withs included."""
    waiting = list(body)  # of a thousand elifs each lies within the one before
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        if not isinstance(node, ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                waiting += getattr(node, field, [])
        for inner in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            waiting += inner.body


def _folder_mistakes(project: Path, path: str) -> Iterator[str]:
    folder = _inside(project, path)
    if folder is None or not folder.is_dir():
        hint = _near(path, {posixpath.dirname(name) for name in _files(project)} - {""})
        found = "is a file" if folder is not None and folder.exists() else "is not in the project"
        yield f"{quoted(path)} {found}; allowed: a folder{hint}"


def _dependency_mistakes(project: Path, path: str) -> Iterator[str]:
    file = _inside(project, path)
    if file is None or not file.is_file():
        found = "is a folder" if file is not None and file.is_dir() else "is not in the project"
        yield f"{quoted(path)} {found}; allowed: a file{_near(path, _files(project))}"


def _inside(project: Path, path: str) -> Path | None:
    root = Path(os.path.realpath(project))
    real = Path(os.path.realpath(root / path))
    return real if real.is_relative_to(root) and _can_be(real) else None


def _can_be(path: Path) -> bool:
    """Whether the file system can hold such a name."""
    try:
        path.exists()
    except OSError:
        return False
    return True


def _files(project: Path) -> Iterable[str]:
    found = (
        os.path.relpath(Path(parent, name), project)
        for parent, _, names in os.walk(project)
        for name in names
    )
    return islice(found, _MOST_FILES)


def _near(path: str, candidates: Iterable[str]) -> str:
    """A candidate of the same name elsewhere, else one that is spelled nearly so."""
    known = sorted(candidates)
    normal = posixpath.normpath(path)
    same = [c for c in known if posixpath.basename(c) == posixpath.basename(normal)]
    return f"; did you mean {quoted(same[0])}?" if same else did_you_mean(normal, known)
