"""The files of dependencies that no environment is made of. A deploy names them. Called by `check`."""

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

_LARGEST = 1 << 20
_MAX_FOLDERS = 1000
_MAX_NAMED = 3
_INSTEAD = f"put what jobs need into {REQUIREMENTS}"
# Tables of pyproject.toml that tools other than uv and pip read, and what exports them.
_TABLES = {
    ("tool", "poetry", "dependencies"): "poetry export -o requirements.txt",
    ("tool", "flit", "metadata", "requires"): "",
    ("tool", "pixi", "dependencies"): "",
    ("tool", "pixi", "pypi-dependencies"): "",
    ("tool", "hatch", "envs", "default", "dependencies"): "",
}
# Files, where neither requirements.txt nor pyproject.toml names a requirement.
_OTHERS = {
    "Pipfile": "pipenv requirements > requirements.txt",
    "environment.yml": "",
    "environment.yaml": "",
    "conda.yml": "",
    "conda.yaml": "",
    "pixi.toml": "",
    "requirements.in": "uv pip compile requirements.in -o requirements.txt",
}
# Files of exact versions, where no requirements.txt is read.
_LOCKS = {
    "uv.lock": "uv export -o requirements.txt",
    "poetry.lock": "poetry export -o requirements.txt",
    "pdm.lock": "pdm export -o requirements.txt",
    "Pipfile.lock": "pipenv requirements > requirements.txt",
    "pylock.toml": "",
}
_REQUIREMENTS = re.compile(r"requirements[-\w.]*\.txt|\w[-\w.]*[-_.]requirements\.txt")
_FOR_OTHERS = re.compile(r"(?:^|[-_./])(?:dev|docs?|examples?|lint|tests?)(?:[-_./]|$)")
_INLINE = re.compile(r"^# dependencies\s*=\s*\[\s*(?:#\s*)?[^\]\s#]", re.MULTILINE)


def unread(project: Path, definition: Definition, wanted: Requirements) -> Iterator[str]:
    """The files of a project that name dependencies and are not read, each with what to do.

    Args:
        wanted: the requirements that are read.
    """
    yield from _shell(project, definition)
    has_pip_file = (project / wanted.pip_file).is_file()
    if "-r" in wanted.arguments:
        for name in () if has_pip_file else _there(project, _LOCKS):
            words = (
                f"{name} is not read, and the first build of the environment chooses versions anew"
            )
            yield words + _export(_LOCKS[name], "; for its versions: ")
        return
    if not has_pip_file:
        yield from _elsewhere(project)
    yield from _tables(project)
    for name in _there(project, _OTHERS):
        yield f"{name} is not read; {_INSTEAD}{_export(_OTHERS[name])}"
    yield from _setup(project)
    yield from _inline(project, definition.path)


def _shell(project: Path, definition: Definition) -> Iterator[str]:
    name = definition.dependencies.shell or SHELL
    if _text(project / name).strip():
        yield (
            f"{name} is not run: environments are of Python's packages alone; install on the machine what it "
            "installs, or let definition.command run it first"
        )


def _elsewhere(project: Path) -> Iterator[str]:
    """Files like requirements.txt that have another name or place."""
    folders = (Path(folder) for folder, _, _ in islice(os.walk(project), _MAX_FOLDERS))
    names = [
        path.relative_to(project).as_posix()
        for folder in folders
        for path in folder.glob("*.txt")
        if _REQUIREMENTS.fullmatch(path.name) or folder.name == "requirements"
    ]
    for name in sorted(name for name in names if not _FOR_OTHERS.search(name))[:_MAX_NAMED]:
        shown = shortened(name)
        yield f"{shown} is not read; name it: definition.dependencies: {{pip: {shown}}}"


def _tables(project: Path) -> Iterator[str]:
    try:
        data: object = tomllib.loads(_text(project / PYPROJECT))
    except (ValueError, RecursionError):
        return  # a mistake, which is told as one
    for keys, command in _TABLES.items():
        table = data
        for key in keys:
            table = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table = table.keys() - {"python"}
        if isinstance(table, list | set) and table:
            shown = f"[{'.'.join(keys)}] of {PYPROJECT}"
            project_table = (
                f"put what jobs need into {REQUIREMENTS} or the dependencies of [project]"
            )
            yield f"{shown} is not read; {project_table}{_export(command)}"


def _setup(project: Path) -> Iterator[str]:
    instead = f"write a line with . into {REQUIREMENTS}, which installs the project"
    if re.search(r"\binstall_requires\b", _text(project / "setup.py")):
        yield f"install_requires of setup.py is not read; {instead}"
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(_text(project / "setup.cfg"))
    except configparser.Error:
        return
    if parser.get("options", "install_requires", fallback="").strip():
        yield f"install_requires of setup.cfg is not read; {instead}"


def _inline(project: Path, path: str | None) -> Iterator[str]:
    text = _text(project / path) if path is not None else ""
    block = text.partition("\n# /// script")[2] if not text.startswith("# /// script") else text
    if _INLINE.search(block.partition("\n# ///\n")[0]):
        yield f"the dependencies in the comment `# /// script` of {path} are not read; {_INSTEAD}"


def _there(project: Path, names: dict[str, str]) -> Iterator[str]:
    return (name for name in names if (project / name).is_file())


def _export(command: str, words: str = ", for example by ") -> str:
    return f"{words}`{command}`" if command else ""


def _text(path: Path) -> str:
    """The beginning of a file, "" for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST).decode("utf-8-sig", "replace")
    except OSError:
        return ""
