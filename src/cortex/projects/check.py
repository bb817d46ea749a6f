"""The check of an unpacked project against its APIs: all mistakes at once, and the warnings, before a job runs.

The operator calls it at deploy. Nothing of the project is run: Python files are only parsed.
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
from cortex.projects.unsupported import unread
from cortex.spec.api import Api, Definition
from cortex.spec.cortex_yaml import field_lines, invalid_spec
from cortex.spec.yaml_lines import Mistake, did_you_mean, quoted

_MOST_FILES = 20_000


def check_files(apis: list[Api], project: Path, file: str, text: str) -> list[list[str]]:
    """Check that the project holds what its APIs name, and that its own files can be read.

    Args:
        file, text: the `cortex.yaml` that the APIs were read from, for the lines in messages.

    Returns:
        The warnings of each API: the project can be deployed, but may not do what its author expects.

    Raises:
        InvalidSpec: with every mistake, each with its file and line.
    """
    lines = field_lines(text)
    mistakes: list[Mistake] = []
    others: list[str] = []
    for index, api in enumerate(apis):
        for field, told in _field_mistakes(project, api.definition):
            line = lines.get((index, "definition", *field), lines.get((index,), 1))
            mistakes.append(Mistake(line, f"definition.{'.'.join(field)}: {told}"))
        others += _syntax_mistakes(project, api.definition)
        others += read_requirements(project, api.definition.dependencies).mistakes
    has_path = any(api.definition.path is not None for api in apis)
    others += check_variables(project, has_path=has_path)
    if mistakes or others:
        raise invalid_spec(file, mistakes, others)
    return [_warnings(project, api.definition) for api in apis]


def _field_mistakes(project: Path, definition: Definition) -> Iterator[tuple[tuple[str, ...], str]]:
    if definition.path is not None:
        for told in _path_mistakes(project, definition.path):
            yield ("path",), told
    if definition.python_path is not None:
        for told in _folder_mistakes(project, definition.python_path):
            yield ("python_path",), told
    for kind, path in definition.dependencies:
        if path is not None:
            for told in _dependency_mistakes(project, path):
                yield ("dependencies", kind), told


def _warnings(project: Path, definition: Definition) -> list[str]:
    wanted = read_requirements(project, definition.dependencies)
    command = definition.command
    return [
        *unread(project, definition, wanted),
        *(() if command is None else programs.doubts(project, command)),
    ]


def _path_mistakes(project: Path, path: str) -> Iterator[str]:
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
            yield from tasks.mistakes(module, path)


def _syntax_mistakes(project: Path, definition: Definition) -> Iterator[str]:
    path = definition.path or ""
    file = _inside(project, path)
    if file is None or file.suffix != ".py" or not file.is_file():
        return
    error = tasks.parse(file)
    wanted = read_requirements(project, definition.dependencies)
    # Another version of Python has another syntax.
    if isinstance(error, SyntaxError) and wanted.python_to_find is None:
        shown = f": {quoted(error.text.strip())}" if error.text else ""
        yield f"{posixpath.normpath(path)}:{error.lineno or 1}: {error.msg}{shown}"


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
