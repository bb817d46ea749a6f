"""Checks an unpacked project against its APIs before a job runs, and reports all errors and
warnings at once.

The operator calls it at deploy. It runs nothing of the project: Python files are parsed only.
"""

from __future__ import annotations

import ast
import os
import posixpath
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from cortex.projects import programs, tasks
from cortex.projects.dotenv import check_variables
from cortex.projects.requirements import read_requirements
from cortex.projects.unsupported import unsupported_files
from cortex.spec.api import Api, Definition
from cortex.spec.cortex_yaml import field_lines, invalid_spec
from cortex.spec.yaml_lines import Mistake, did_you_mean, quoted

_MAX_FILES = 20_000


def check_files(apis: list[Api], project: Path, file: str, text: str) -> list[list[str]]:
    """Check that the project contains the files that its APIs name, and that its own files can be
    read.

    Args:
        file, text: the `cortex.yaml` that defines the APIs, for the lines in messages.

    Returns:
        The warnings of each API: the project can be deployed, but may not do what its author
            expects.

    Raises:
        InvalidSpec: with every error, each with its file and line.
    """
    lines = field_lines(text)
    mistakes: list[Mistake] = []
    others: list[str] = []
    for index, api in enumerate(apis):
        for field, error in _field_errors(project, api.definition):
            line = lines.get((index, "definition", *field), lines.get((index,), 1))
            mistakes.append(Mistake(line, f"definition.{'.'.join(field)}: {error}"))
        others += _syntax_errors(project, api.definition)
        others += read_requirements(project, api.definition.dependencies).errors
    has_path = any(api.definition.path is not None for api in apis)
    others += check_variables(project, has_path=has_path)
    if mistakes or others:
        raise invalid_spec(file, mistakes, others)
    return [_warnings(project, api.definition) for api in apis]


def _field_errors(project: Path, definition: Definition) -> Iterator[tuple[tuple[str, ...], str]]:
    """The errors of fields that name files, each with its field."""
    if definition.path is not None:
        for error in _path_errors(project, definition.path):
            yield ("path",), error
    if definition.python_path is not None:
        for error in _folder_errors(project, definition.python_path):
            yield ("python_path",), error
    for kind, path in definition.dependencies:
        if path is not None:
            for error in _dependency_errors(project, path):
                yield ("dependencies", kind), error


def _warnings(project: Path, definition: Definition) -> list[str]:
    requirements = read_requirements(project, definition.dependencies)
    command = definition.command
    return [
        *unsupported_files(project, definition, requirements),
        *(() if command is None else programs.command_warnings(project, command)),
    ]


def _path_errors(project: Path, path: str) -> Iterator[str]:
    file = _inside(project, path)
    if file is None or not file.is_file():
        hint = _near(path, (name for name in _files(project) if name.endswith(".py")))
        found = "is a folder" if file is not None and file.is_dir() else "is not in the project"
        yield f"{quoted(path)} {found}; allowed: a Python file{hint}"
    elif file.suffix != ".py":
        yield f"found {quoted(path)}; allowed: a file whose name ends in .py (or use command)"
    else:
        module = tasks.parse(file)
        if isinstance(module, ast.Module):
            yield from tasks.task_errors(module, path)


def _syntax_errors(project: Path, definition: Definition) -> Iterator[str]:
    path = definition.path or ""
    file = _inside(project, path)
    if file is None or file.suffix != ".py" or not file.is_file():
        return
    error = tasks.parse(file)
    requirements = read_requirements(project, definition.dependencies)
    # The syntax of another version of Python may differ.
    if isinstance(error, SyntaxError) and requirements.python_to_find is None:
        shown = f": {quoted(error.text.strip())}" if error.text else ""
        yield f"{posixpath.normpath(path)}:{error.lineno or 1}: {error.msg}{shown}"


def _folder_errors(project: Path, path: str) -> Iterator[str]:
    folder = _inside(project, path)
    if folder is None or not folder.is_dir():
        hint = _near(path, {posixpath.dirname(name) for name in _files(project)} - {""})
        found = "is a file" if folder is not None and folder.exists() else "is not in the project"
        yield f"{quoted(path)} {found}; allowed: a folder{hint}"


def _dependency_errors(project: Path, path: str) -> Iterator[str]:
    file = _inside(project, path)
    if file is None or not file.is_file():
        found = "is a folder" if file is not None and file.is_dir() else "is not in the project"
        yield f"{quoted(path)} {found}; allowed: a file{_near(path, _files(project))}"


def _inside(project: Path, path: str) -> Path | None:
    """The real path of a file in the project; None for a path outside, and for a name that is not
    possible."""
    root = Path(os.path.realpath(project))
    real = Path(os.path.realpath(root / path))
    return real if real.is_relative_to(root) and _is_possible(real) else None


def _is_possible(path: Path) -> bool:
    """Whether the file system accepts the name: it may be too long."""
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
    return islice(found, _MAX_FILES)


def _near(path: str, candidates: Iterable[str]) -> str:
    """A hint: a candidate of the same name in another folder, else one with a similar spelling."""
    known = sorted(candidates)
    normal = posixpath.normpath(path)
    same = [c for c in known if posixpath.basename(c) == posixpath.basename(normal)]
    return f"; did you mean {quoted(same[0])}?" if same else did_you_mean(normal, known)
