"""The files of a folder that an upload leaves out: those that `.cortexignore` excludes, dot-files, byte code,
environments and caches of tools. Called by `pack`.

`.cortexignore` brings an environment, a cache or a dot-file back with a line such as `!node_modules/`. The last part
of the line has to be a name: `!*/` stands in many files, and does not mean the environments.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from pathspec import GitIgnoreSpec

from cortex.errors import InvalidProject

IGNORE_FILE = ".cortexignore"

_BYTE_CODE = (".pyc", ".pyo")
_PYCACHE = "__pycache__"
_VENV = "a virtual environment"
_VENV_MARKS = ("pyvenv.cfg", "bin/activate")  # the second of those that old tools made
_CACHE = "the cache of a tool"
_CACHES = (".tox", ".nox", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis")
_NAMED = {"node_modules": "packages of Node", **dict.fromkeys(_CACHES, _CACHE)}
# Where the project's folder itself was made a virtual environment.
_OF_ROOT_VENV = {"bin", "include", "lib", "lib64"}
_BACK = re.compile(r"!(?P<pattern>(?:.*/)?[^/*?\[\\]+/?)\s*")
_MAX_NAMED = 5


class Everything:
    """Chooses all files of a project that was unpacked, but byte code, sockets and pipes that its jobs left there."""

    def take(self, name: str, entry: os.DirEntry[str]) -> bool:
        """Whether a file or folder belongs to the project."""
        mode = entry.stat(follow_symlinks=False).st_mode
        is_usual = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        return is_usual and entry.name != _PYCACHE


class Chosen:
    """Chooses the files of a folder that are uploaded."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            InvalidProject: it is no folder, or its `.cortexignore` cannot be read.
        """
        if not root.is_dir():
            raise InvalidProject(f"{root} is not a folder")
        lines = _lines(root / IGNORE_FILE)
        back = [found["pattern"] for line in lines if (found := _BACK.fullmatch(line))]
        self._ignored = GitIgnoreSpec.from_lines(lines)
        self._back = GitIgnoreSpec.from_lines(back)
        self._is_venv = (root / "pyvenv.cfg").is_file()
        self._left_out: list[tuple[str, str]] = []

    def take(self, name: str, entry: os.DirEntry[str]) -> bool:
        """Whether a file or folder belongs to the project. The caller asks for nothing inside a folder that does not."""
        path = f"{name}/" if entry.is_dir(follow_symlinks=False) else name
        if self._verdict(path) is True:
            return False
        why = self._why_left_out(name, entry)
        if why is None or self._back.match_file(path):
            return True
        if why:
            self._left_out.append((path, why))
        return False

    def left_out(self) -> str | None:
        """The environments and caches that were left out, in words; None where there are none."""
        if not self._left_out:
            return None
        found = sorted(self._left_out, key=lambda each: each[1] == _CACHE)
        shown = [f"{path} ({why})" for path, why in found[:_MAX_NAMED]]
        more = len(found) - len(shown)
        rest = f" and {more} more" if more > 0 else ""
        first = found[0][0]
        return (
            f"left out of the upload: {', '.join(shown)}{rest}; where jobs need it, a line such as !{first} "
            f"in {IGNORE_FILE} brings it back"
        )

    def _verdict(self, path: str) -> bool | None:
        """The verdict of `.cortexignore` on a path, as git has it: True excludes the path, False brings it back, None
        is no verdict. Only patterns of the path itself count, since the caller enters no excluded folder.
        `GitIgnoreSpec.match_file` is for single paths: patterns of the folders above count there."""
        for pattern in reversed(self._ignored.patterns):
            found = None if pattern.include is None else pattern.match_file(path)
            if found is not None and _is_of(path, found.match):
                return pattern.include
        return None

    def _why_left_out(self, name: str, entry: os.DirEntry[str]) -> str | None:
        """What a file or folder is that no project needs, "" for dot-files and byte code; None for the others."""
        if os.path.isdir(entry.path):  # noqa: PTH112  # also for a link that cannot be followed
            if entry.name in _NAMED:
                return _NAMED[entry.name]
            if any(os.path.isfile(f"{entry.path}/{mark}") for mark in _VENV_MARKS):  # noqa: PTH113
                return _VENV
            if os.path.isdir(f"{entry.path}/conda-meta"):  # noqa: PTH112
                return "a conda environment"
            if self._is_venv and name in _OF_ROOT_VENV:
                return f"{_VENV}, which the project's own folder is"
        is_hidden = entry.name.startswith(".") and name != ".env"
        is_made = entry.name == _PYCACHE or entry.name.endswith(_BYTE_CODE)
        return "" if is_hidden or is_made else None


def _is_of(path: str, match: re.Match[str]) -> bool:
    """Whether a pattern names a path itself, not a folder above it: a group of the pattern ends where its folder
    does."""
    group = match.lastindex
    return group is None or any(
        each.lastindex is None or each.end(group) == len(path) for each in match.re.finditer(path)
    )


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidProject(f"{IGNORE_FILE} is not UTF-8 text; save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError as error:
            found = f"found {line!r}; allowed: a pattern as in .gitignore"
            raise InvalidProject(f"{IGNORE_FILE}:{number}: {found}") from error
    return lines
