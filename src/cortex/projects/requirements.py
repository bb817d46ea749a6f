"""The requirements of a project's environment: requirements.txt, pyproject.toml,
conda-packages.txt.

`builder` installs what this module reads; `check` reports the errors at deploy.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.specifiers import SpecifierSet

from cortex.projects import conda
from cortex.spec.api import DEFAULT_DEPENDENCIES, Dependencies
from cortex.spec.yaml_lines import shortened

REQUIREMENTS = "requirements.txt"
PYPROJECT = "pyproject.toml"
CONDA = "conda-packages.txt"
UV_TOML = "uv.toml"

_INCLUDE = re.compile(r"(?:-[rc]\s*=?|--(?:requirement|constraint)[\s=])\s*(\S.*)")
_LOCAL_OPTION = re.compile(r"(?:-[ef]\s*=?|--(?:editable|find-links)[\s=])\s*(\S.*)")
_ARCHIVES = (".whl", ".tar.gz", ".zip")
# The minor version of Python 3 that the worker's code needs.
_MIN_MINOR = 9
MIN_PYTHON = f"3.{_MIN_MINOR}"
_TOO_OLD = [(2, 7, 18), *((3, minor, patch) for minor in range(_MIN_MINOR) for patch in range(25))]
_MAX_SPECIFIER_LENGTH = 200
_RECENT = [(3, minor, patch) for minor in range(_MIN_MINOR, 20) for patch in range(30)]


@dataclass
class Requirements:
    """The content of the project's files and the errors in them; filled while the files are
    read."""

    pip_file: str = REQUIREMENTS
    conda_file: str = CONDA
    python: str | None = None
    requires_python: str | None = None
    pip: str | None = None
    arguments: list[str] = field(default_factory=list)
    """The arguments of `uv pip install`."""
    lines: list[tuple[str, str]] = field(default_factory=list)
    """The lines that decide what is installed, each with the name of its file."""
    is_local: bool = False
    """Whether a requirement is installed from the project's own folder."""
    errors: list[str] = field(default_factory=list)

    @property
    def python_to_find(self) -> str | None:
        """The version of Python that uv must find; None if the operator's own satisfies the
        project."""
        own = sys.version_info[:3]
        if self.python and self.python[0].isdigit():
            version = tuple(int(part) for part in self.python.split("."))
            return None if own[: len(version)] == version else self.python
        requires = self.python or self.requires_python
        return None if not requires or satisfies(own, requires) else requires

    @property
    def python_for_uv(self) -> str | None:
        """The same for `uv --python`: a range excludes versions that are too old for jobs."""
        version = self.python_to_find
        return version if version is None or version[0].isdigit() else f"{version},>={MIN_PYTHON}"


def read_requirements(
    project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES
) -> Requirements:
    """Read everything that decides what the project's environment contains.

    Args:
        dependencies: the project's files that list the requirements.
    """
    requirements = Requirements(
        pip_file=posixpath.normpath(dependencies.pip or REQUIREMENTS),
        conda_file=posixpath.normpath(dependencies.conda or CONDA),
    )
    text = _text(project, requirements.conda_file, requirements)
    found = conda.read_packages(text, requirements.conda_file)
    requirements.python, requirements.pip = found.python, found.pip
    requirements.errors += found.errors
    _read_requirements_txt(project, requirements)
    _read_pyproject(project, requirements)
    _check_python(requirements)
    if requirements.pip is not None:
        is_prefix = requirements.pip[:1].isdigit()
        requirements.arguments.append(
            f"pip=={requirements.pip}.*" if is_prefix else f"pip{requirements.pip}"
        )
        requirements.lines.append(("pip", requirements.pip))
    text = _text(project, UV_TOML, requirements)
    if text and requirements.arguments:
        requirements.lines.append((UV_TOML, text))
    return requirements


def _text(project: Path, name: str, requirements: Requirements) -> str:
    inside = _inside(project, name)
    if inside is None or not _is_file(project / inside):
        return ""
    try:
        return (project / inside).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        requirements.errors.append(f"{name}: not UTF-8 text; save it as UTF-8")
        return ""


def _read_requirements_txt(project: Path, requirements: Requirements) -> None:
    pending, seen = [requirements.pip_file], {requirements.pip_file}
    found: list[tuple[str, str]] = []
    while pending:
        name = pending.pop(0)
        for number, line in _logical_lines(_text(project, name, requirements)):
            found.append((name, line))
            include = _INCLUDE.fullmatch(line)
            if include is None:
                requirements.is_local |= is_local(line)
                continue
            path = include[1].strip("'\"")
            if "://" in path:
                continue
            inside = _inside(project, posixpath.join(posixpath.dirname(name), path))
            if inside is None:
                message = "leaves the project; allowed: a file inside it"
                requirements.errors.append(f"{name}:{number}: {line[:60]}: {message}")
            elif not _is_file(project / inside):
                requirements.errors.append(
                    f"{name}:{number}: {line[:60]}: the project has no file {inside}"
                )
            elif inside not in seen:
                seen.add(inside)
                pending.append(inside)
    if found:
        requirements.arguments += ["-r", requirements.pip_file]
        requirements.lines += found


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines without comments, each with its number. A backslash at the end joins a line with
    the next."""
    pending, start = "", 0
    for number, raw in enumerate([*text.splitlines(), ""], start=1):
        start = start if pending else number
        line = pending + re.sub(r"(^|\s)#.*", "", raw)
        if line.endswith("\\") and number <= len(text.splitlines()):
            pending = line[:-1] + " "
            continue
        pending = ""
        if line.strip():
            yield start, line.strip()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long for a file
        return False


def _inside(project: Path, path: str) -> str | None:
    if "\0" in path:
        return None
    normal = posixpath.normpath(path)
    root = os.path.realpath(project)
    real = Path(os.path.realpath(Path(root, normal)))
    is_within = not normal.startswith(("/", "../")) and normal != ".."
    return normal if is_within and real.is_relative_to(root) else None


def is_local(line: str) -> bool:
    """Whether a line installs from a path, so that the content of that path is part of the
    requirements."""
    option = _LOCAL_OPTION.fullmatch(line)
    target = option[1] if option else line.partition(" @ ")[2] or line
    target = target.partition(";")[0].strip().strip("'\"")
    if "://" in target or target.startswith("file:"):
        return "file:" in target
    if line.startswith("-") and option is None:
        return False
    path = target.partition("[")[0].partition(" --")[0]
    return option is not None or path.startswith(".") or "/" in path or path.endswith(_ARCHIVES)


def _read_pyproject(project: Path, requirements: Requirements) -> None:
    text = _text(project, PYPROJECT, requirements)
    try:
        data = tomllib.loads(text)
    except RecursionError:
        requirements.errors.append(f"{PYPROJECT}: is not valid TOML: nested too deeply")
        return
    except ValueError as error:  # a TOMLDecodeError, or a number with too many digits
        line = re.search(r"at line (\d+)", str(error))
        position = f"{PYPROJECT}:{line[1]}" if line else PYPROJECT
        requirements.errors.append(f"{position}: is not valid TOML: {error}")
        return
    table = data.get("project", {})
    uv_table = data.get("tool", {}).get("uv", {}) if isinstance(data.get("tool", {}), dict) else {}
    if not isinstance(table, dict):
        requirements.errors.append(f"{PYPROJECT}: project: {_found(table)}; allowed: a table")
        return
    requires, dynamic = table.get("requires-python"), table.get("dynamic", [])
    dependencies = table.get("dependencies", [])
    if requires is not None and not isinstance(requires, str):
        requirements.errors.append(
            f"{PYPROJECT}: project.requires-python: {_found(requires)}; allowed: a string"
        )
        requires = None
    if not isinstance(dependencies, list) or not all(isinstance(d, str) for d in dependencies):
        requirements.errors.append(
            f"{PYPROJECT}: project.dependencies: {_found(dependencies)}; allowed: a list of strings"
        )
        return
    requirements.requires_python = requires
    is_dynamic = isinstance(dynamic, list) and "dependencies" in dynamic
    if dependencies or is_dynamic:
        requirements.arguments += ["-r", PYPROJECT]
        requirements.lines += [(PYPROJECT, dependency) for dependency in dependencies]
        requirements.is_local |= is_dynamic or any(map(is_local, dependencies))
    if uv_table and (requirements.arguments or requirements.pip is not None):
        # Indexes and sources decide which package a name means, and a source can be a folder.
        requirements.lines.append((f"{PYPROJECT} tool.uv", repr(uv_table)))
        requirements.is_local |= "'path':" in repr(uv_table) or "'workspace':" in repr(uv_table)


def _found(value: object) -> str:
    return f"found {shortened(repr(value))}"


def satisfies(version: tuple[int, ...], specifier: str) -> bool:
    """Whether `requires-python` allows a version of Python; False for a specifier that is not
    valid."""
    try:
        allowed = SpecifierSet(specifier)
        return allowed.contains(".".join(map(str, version)), prereleases=True)
    except ValueError:  # uv reports the error
        return False


def _check_python(requirements: Requirements) -> None:
    """Report a request for a Python that is too old for jobs."""
    version = requirements.python_to_find
    if version is None or len(version) > _MAX_SPECIFIER_LENGTH:
        return
    specifier = f"=={version}.*" if version[0].isdigit() else version
    if not any(satisfies(each, specifier) for each in _TOO_OLD):
        return
    if not any(satisfies(each, specifier) for each in _RECENT):
        file = requirements.conda_file if requirements.python else PYPROJECT
        requirements.errors.append(
            f"{file}: found Python {version}; allowed: {MIN_PYTHON} or later, "
            f"such as python={sys.version_info[0]}.{sys.version_info[1]}, which the operator has"
        )
