"""What a project asks of its environment: requirements.txt, pyproject.toml, conda-packages.txt.

`building` installs what is read here; `check` tells the mistakes at deploy.
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

REQUIREMENTS = "requirements.txt"
PYPROJECT = "pyproject.toml"
CONDA = "conda-packages.txt"
UV_TOML = "uv.toml"

_INCLUDE = re.compile(r"(?:-[rc]\s*=?|--(?:requirement|constraint)[\s=])\s*(\S.*)")
_LOCAL_OPTION = re.compile(r"(?:-[ef]\s*=?|--(?:editable|find-links)[\s=])\s*(\S.*)")
_ARCHIVES = (".whl", ".tar.gz", ".zip")
# What the worker's code runs on.
_MIN_MINOR = 9
MIN_PYTHON = f"3.{_MIN_MINOR}"
_TOO_OLD = [(2, 7, 18), *((3, minor, patch) for minor in range(_MIN_MINOR) for patch in range(25))]
_LONGEST_SPECIFIER = 200
_RECENT = [(3, minor, patch) for minor in range(_MIN_MINOR, 20) for patch in range(30)]


@dataclass
class Requirements:
    """What the project's files say, and the mistakes in them; filled while they are read."""

    pip_file: str = REQUIREMENTS
    conda_file: str = CONDA
    python: str | None = None
    requires_python: str | None = None
    pip: str | None = None
    arguments: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    is_local: bool = False
    mistakes: list[str] = field(default_factory=list)

    @property
    def python_to_find(self) -> str | None:
        """The Python that uv has to find, None where the operator's own will do."""
        own = sys.version_info[:3]
        if self.python and self.python[0].isdigit():
            asked = tuple(int(part) for part in self.python.split("."))
            return None if own[: len(asked)] == asked else self.python
        requires = self.python or self.requires_python
        return None if not requires or satisfies(own, requires) else requires

    @property
    def python_for_uv(self) -> str | None:
        """The same as uv is asked for it, which takes no older one than jobs can run on."""
        asked = self.python_to_find
        return asked if asked is None or asked[0].isdigit() else f"{asked},>={MIN_PYTHON}"


def read_requirements(
    project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES
) -> Requirements:
    """Everything that decides what is installed: `arguments` of `uv pip install`, the `lines` that
    they stand for, and whether some of it lies in the project itself (`is_local`)."""
    wanted = Requirements(
        pip_file=posixpath.normpath(dependencies.pip or REQUIREMENTS),
        conda_file=posixpath.normpath(dependencies.conda or CONDA),
    )
    found = conda.read(_text(project, wanted.conda_file, wanted), wanted.conda_file)
    wanted.python, wanted.pip = found.python, found.pip
    wanted.mistakes += found.mistakes
    _requirements(project, wanted)
    _pyproject(project, wanted)
    _check_python(wanted)
    if wanted.pip is not None:
        is_prefix = wanted.pip[:1].isdigit()
        wanted.arguments.append(f"pip=={wanted.pip}.*" if is_prefix else f"pip{wanted.pip}")
        wanted.lines.append(("pip", wanted.pip))
    text = _text(project, UV_TOML, wanted)
    if text and wanted.arguments:
        wanted.lines.append((UV_TOML, text))
    return wanted


def _text(project: Path, name: str, wanted: Requirements) -> str:
    inside = _inside(project, name)
    if inside is None or not _is_file(project / inside):
        return ""
    try:
        return (project / inside).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        wanted.mistakes.append(f"{name}: not UTF-8 text; save it as UTF-8")
        return ""


def _requirements(project: Path, wanted: Requirements) -> None:
    waiting, seen = [wanted.pip_file], {wanted.pip_file}
    found: list[tuple[str, str]] = []
    while waiting:
        name = waiting.pop(0)
        for number, line in _logical_lines(_text(project, name, wanted)):
            found.append((name, line))
            include = _INCLUDE.fullmatch(line)
            if include is None:
                wanted.is_local |= is_local(line)
                continue
            path = include[1].strip("'\"")
            if "://" in path:
                continue
            inside = _inside(project, posixpath.join(posixpath.dirname(name), path))
            if inside is None:
                told = "leaves the project; allowed: a file inside it"
                wanted.mistakes.append(f"{name}:{number}: {line[:60]}: {told}")
            elif not _is_file(project / inside):
                wanted.mistakes.append(f"{name}:{number}: {line[:60]}: there is no file {inside}")
            elif inside not in seen:
                seen.add(inside)
                waiting.append(inside)
    if found:
        wanted.arguments += ["-r", wanted.pip_file]
        wanted.lines += found


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments, those that a backslash continues joined; with the number of the first."""
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
    except OSError:  # longer than any file's name
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
    """Whether a requirement is installed from a path, whose content then decides, too."""
    option = _LOCAL_OPTION.fullmatch(line)
    target = option[1] if option else line.partition(" @ ")[2] or line
    target = target.partition(";")[0].strip().strip("'\"")
    if "://" in target or target.startswith("file:"):
        return "file:" in target
    if line.startswith("-") and option is None:
        return False
    path = target.partition("[")[0].partition(" --")[0]
    return option is not None or path.startswith(".") or "/" in path or path.endswith(_ARCHIVES)


def _pyproject(project: Path, wanted: Requirements) -> None:
    text = _text(project, PYPROJECT, wanted)
    try:
        data = tomllib.loads(text)
    except RecursionError:
        wanted.mistakes.append(f"{PYPROJECT}: cannot be read as TOML: nested too deeply")
        return
    except ValueError as error:  # of a number with too many digits, too
        line = re.search(r"at line (\d+)", str(error))
        place = f"{PYPROJECT}:{line[1]}" if line else PYPROJECT
        wanted.mistakes.append(f"{place}: cannot be read as TOML: {error}")
        return
    table = data.get("project", {})
    uv_table = data.get("tool", {}).get("uv", {}) if isinstance(data.get("tool", {}), dict) else {}
    if not isinstance(table, dict):
        wanted.mistakes.append(f"{PYPROJECT}: project: allowed: a table")
        return
    requires, dynamic = table.get("requires-python"), table.get("dynamic", [])
    dependencies = table.get("dependencies", [])
    if requires is not None and not isinstance(requires, str):
        wanted.mistakes.append(f"{PYPROJECT}: project.requires-python: allowed: a string")
        requires = None
    if not isinstance(dependencies, list) or not all(isinstance(d, str) for d in dependencies):
        wanted.mistakes.append(f"{PYPROJECT}: project.dependencies: allowed: a list of strings")
        return
    wanted.requires_python = requires
    is_dynamic = isinstance(dynamic, list) and "dependencies" in dynamic
    if dependencies or is_dynamic:
        wanted.arguments += ["-r", PYPROJECT]
        wanted.lines += [(PYPROJECT, dependency) for dependency in dependencies]
        wanted.is_local |= is_dynamic or any(map(is_local, dependencies))
    if uv_table and (wanted.arguments or wanted.pip is not None):
        # Indexes and sources: they decide what a name stands for, and a source can be a folder.
        wanted.lines.append((f"{PYPROJECT} tool.uv", repr(uv_table)))
        wanted.is_local |= "'path':" in repr(uv_table) or "'workspace':" in repr(uv_table)


def satisfies(version: tuple[int, ...], specifier: str) -> bool:
    """Whether a version of Python is one that `requires-python` allows; False where it is unclear."""
    try:
        allowed = SpecifierSet(specifier)
        return allowed.contains(".".join(map(str, version)), prereleases=True)
    except ValueError:  # uv says what is wrong with it
        return False


def _check_python(wanted: Requirements) -> None:
    asked = wanted.python_to_find
    if asked is None or len(asked) > _LONGEST_SPECIFIER:
        return
    specifier = f"=={asked}.*" if asked[0].isdigit() else asked
    if not any(satisfies(each, specifier) for each in _TOO_OLD):
        return
    if not any(satisfies(each, specifier) for each in _RECENT):
        file = wanted.conda_file if wanted.python else PYPROJECT
        wanted.mistakes.append(
            f"{file}: found Python {asked}; allowed: {MIN_PYTHON} or later, "
            f"such as python={sys.version_info[0]}.{sys.version_info[1]}, which the operator has"
        )
