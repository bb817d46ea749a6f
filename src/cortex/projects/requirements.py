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

REQUIREMENTS = "requirements.txt"
PYPROJECT = "pyproject.toml"
CONDA = "conda-packages.txt"
UV_TOML = "uv.toml"

_CONDA_LINE = re.compile(
    r"(python|pip)(?:\s*==?\s*(\d{1,9}(?:\.\d{1,9}){0,2})(?:\.\*)?)?", re.IGNORECASE
)
_INCLUDE = re.compile(r"(?:-[rc]\s*=?|--(?:requirement|constraint)[\s=])\s*(\S.*)")
_LOCAL_OPTION = re.compile(r"(?:-[ef]\s*=?|--(?:editable|find-links)[\s=])\s*(\S.*)")
_ARCHIVES = (".whl", ".tar.gz", ".zip")


@dataclass
class Requirements:
    """What the project's files say, and the mistakes in them; filled while they are read."""

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
        if self.python:
            asked = tuple(int(part) for part in self.python.split("."))
            return None if own[: len(asked)] == asked else self.python
        requires = self.requires_python
        return None if not requires or satisfies(own, requires) else requires


def read_requirements(project: Path) -> Requirements:
    """Everything that decides what is installed: `arguments` of `uv pip install`, the `lines` that
    they stand for, and whether some of it lies in the project itself (`is_local`)."""
    wanted = Requirements()
    _conda(project, wanted)
    _requirements(project, wanted)
    _pyproject(project, wanted)
    if wanted.pip is not None:
        wanted.arguments.append(f"pip=={wanted.pip}.*" if wanted.pip else "pip")
        wanted.lines.append(("pip", wanted.pip))
    text = _text(project, UV_TOML, wanted)
    if text and wanted.arguments:
        wanted.lines.append((UV_TOML, text))
    return wanted


def check_requirements(project: Path) -> list[str]:
    """The mistakes in the files that say what is installed, each with its file and line."""
    return read_requirements(project).mistakes


def _text(project: Path, name: str, wanted: Requirements) -> str:
    path = project / name
    if not path.is_file():
        return ""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        wanted.mistakes.append(f"{name}: not UTF-8 text; save it as UTF-8")
        return ""


def _conda(project: Path, wanted: Requirements) -> None:
    for number, raw in enumerate(_text(project, CONDA, wanted).splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        matched = _CONDA_LINE.fullmatch(line)
        if not line:
            continue
        if matched is None:
            only = "only python=… and pip=… are supported here; put it in requirements.txt"
            wanted.mistakes.append(f"{CONDA}:{number}: {line[:60]}: {only}")
            continue
        name, version = matched[1].lower(), matched[2] or ""
        before = wanted.python if name == "python" else wanted.pip
        if before not in {None, version}:
            wanted.mistakes.append(f"{CONDA}:{number}: {line[:60]}: {name} is given twice")
        elif name == "python":
            wanted.python = version
        else:
            wanted.pip = version


def _requirements(project: Path, wanted: Requirements) -> None:
    waiting, seen = [REQUIREMENTS], {REQUIREMENTS}
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
        wanted.arguments += ["-r", REQUIREMENTS]
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
    return all(_satisfies(version, clause.strip()) for clause in specifier.split(","))


def _satisfies(version: tuple[int, ...], clause: str) -> bool:
    matched = re.fullmatch(r"(~=|===?|!=|<=|>=|<|>)\s*(\d{1,9}(?:\.\d{1,9})*)(\.\*)?", clause)
    if matched is None:
        return not clause
    operator, given = matched[1], tuple(int(part) for part in matched[2].split("."))
    padded = given + (0,) * (3 - len(given))
    is_prefix = version[: len(given)] == given
    is_equal = is_prefix if matched[3] else version == padded
    answers = {
        "~=": version >= padded and version[: len(given) - 1] == given[:-1],
        "==": is_equal,
        "===": is_equal,
        "!=": not is_equal,
        "<=": version <= padded,
        ">=": version >= padded,
        "<": version < padded,
        ">": version > padded,
    }
    return answers[operator]
