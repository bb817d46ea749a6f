"""Finds files that list dependencies in a format that no environment is built from, so that a
deploy warns about them. Called by `check`.
"""

from __future__ import annotations

import configparser
import os
import re
import tomllib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cortex.projects.requirements import PYPROJECT, REQUIREMENTS, Requirements
from cortex.spec.api import Definition
from cortex.spec.yaml_lines import shortened

SHELL = "dependencies.sh"

_MAX_READ_BYTES = 1 << 20
_MAX_FOLDERS = 1000
_MAX_NAMED = 3
_ADVICE = f"list the packages that jobs need in {REQUIREMENTS}"
# Tables of pyproject.toml for tools other than uv and pip, each with the command that exports it.
_TABLES = {
    ("tool", "poetry", "dependencies"): "poetry export -o requirements.txt",
    ("tool", "flit", "metadata", "requires"): "",
    ("tool", "pixi", "dependencies"): "",
    ("tool", "pixi", "pypi-dependencies"): "",
    ("tool", "hatch", "envs", "default", "dependencies"): "",
}
# Files that matter if neither requirements.txt nor pyproject.toml lists a requirement.
_UNREAD_FILES = {
    "Pipfile": "pipenv requirements > requirements.txt",
    "environment.yml": "",
    "environment.yaml": "",
    "conda.yml": "",
    "conda.yaml": "",
    "pixi.toml": "",
    "requirements.in": "uv pip compile requirements.in -o requirements.txt",
}
# Files of exact versions that matter if no requirements.txt is read.
_LOCKS = {
    "uv.lock": "uv export -o requirements.txt",
    "poetry.lock": "poetry export -o requirements.txt",
    "pdm.lock": "pdm export -o requirements.txt",
    "Pipfile.lock": "pipenv requirements > requirements.txt",
    "pylock.toml": "",
}
_REQUIREMENTS = re.compile(r"requirements[-\w.]*\.txt|\w[-\w.]*[-_.]requirements\.txt")
_NOT_FOR_JOBS = re.compile(r"(?:^|[-_./])(?:dev|docs?|examples?|lint|tests?)(?:[-_./]|$)")
_INLINE = re.compile(r"^# dependencies\s*=\s*\[\s*(?:#\s*)?[^\]\s#]", re.MULTILINE)


def unsupported_files(
    project: Path, definition: Definition, requirements: Requirements
) -> Iterator[str]:
    """A warning for each file of a project that lists dependencies and is not read, with advice.

    Args:
        requirements: the requirements that are read.
    """
    yield from _shell_script(project, definition)
    has_pip_file = (project / requirements.pip_file).is_file()
    if "-r" in requirements.arguments:
        for name in () if has_pip_file else _existing(project, _LOCKS):
            problem = (
                f"{name} is not read: the first build of the environment resolves versions again"
            )
            yield problem + _export(_LOCKS[name], "; to keep these versions, use ")
        return
    if not has_pip_file:
        yield from _other_requirements(project)
    yield from _tables(project)
    for name in _existing(project, _UNREAD_FILES):
        yield f"{name} is not read; {_ADVICE}{_export(_UNREAD_FILES[name])}"
    yield from _setup_files(project)
    yield from _inline(project, definition.path)


def _shell_script(project: Path, definition: Definition) -> Iterator[str]:
    name = definition.dependencies.shell or SHELL
    if _text(project / name).strip():
        yield (
            f"{name} is not run, because environments contain Python packages only; install on the "
            "machine what it installs, or run it first in definition.command"
        )


def _other_requirements(project: Path) -> Iterator[str]:
    """Files like requirements.txt with another name or in another folder."""
    folders = (Path(folder) for folder, _, _ in islice(os.walk(project), _MAX_FOLDERS))
    names = [
        path.relative_to(project).as_posix()
        for folder in folders
        for path in folder.glob("*.txt")
        if _REQUIREMENTS.fullmatch(path.name) or folder.name == "requirements"
    ]
    for name in sorted(name for name in names if not _NOT_FOR_JOBS.search(name))[:_MAX_NAMED]:
        shown = shortened(name)
        yield f"{shown} is not read; to install it, set definition.dependencies: {{pip: {shown}}}"


def _tables(project: Path) -> Iterator[str]:
    try:
        data: object = tomllib.loads(_text(project / PYPROJECT))
    except (ValueError, RecursionError):
        return  # `requirements` reports the error
    for keys, command in _TABLES.items():
        table = data
        for key in keys:
            table = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table = table.keys() - {"python"}
        if isinstance(table, list | set) and table:
            advice = f"{_ADVICE} or in the dependencies of [project]{_export(command)}"
            yield f"[{'.'.join(keys)}] of {PYPROJECT} is not read; {advice}"


def _setup_files(project: Path) -> Iterator[str]:
    advice = f"add the line . to {REQUIREMENTS}, which installs the project"
    if re.search(r"\binstall_requires\b", _text(project / "setup.py")):
        yield f"install_requires of setup.py is not read; {advice}"
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(_text(project / "setup.cfg"))
    except configparser.Error:
        return
    if parser.get("options", "install_requires", fallback="").strip():
        yield f"install_requires of setup.cfg is not read; {advice}"


def _inline(project: Path, path: str | None) -> Iterator[str]:
    text = _text(project / path) if path is not None else ""
    block = text.partition("\n# /// script")[2] if not text.startswith("# /// script") else text
    if _INLINE.search(block.partition("\n# ///\n")[0]):
        yield f"the dependencies in the comment `# /// script` of {path} are not read; {_ADVICE}"


def _existing(project: Path, names: dict[str, str]) -> Iterator[str]:
    return (name for name in names if (project / name).is_file())


def _export(command: str, purpose: str = ", for example by ") -> str:
    return f"{purpose}`{command}`" if command else ""


def _text(path: Path) -> str:
    """The start of a file; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_READ_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return ""
