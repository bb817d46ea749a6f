"""Selects the files of an upload. Excluded are files that match `.cortexignore`, dot-files, byte
code, environments and caches of tools. Called by `pack`.

A line such as `!node_modules/` in `.cortexignore` includes an environment, a cache or a dot-file
again. The last part of the line must be a name: `!*/` is a common line, and does not refer to
environments.
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
_VENV_MARKS = ("pyvenv.cfg", "bin/activate")  # old tools wrote the second one only
_CACHE = "the cache of a tool"
_CACHES = (".tox", ".nox", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis")
_EXCLUDED = {"node_modules": "packages of Node", **dict.fromkeys(_CACHES, _CACHE)}
# Excluded if the project's own folder is a virtual environment.
_ROOT_VENV_FOLDERS = {"bin", "include", "lib", "lib64"}
_INCLUDE = re.compile(r"!(?P<pattern>(?:.*/)?[^/*?\[\\]+/?)\s*")
_MAX_NAMED = 5


class StoredFiles:
    """Selects all files of an unpacked project, except byte code, sockets, pipes and devices that
    its jobs have made."""

    def includes(self, name: str, entry: os.DirEntry[str]) -> bool:
        """Whether a file or folder belongs to the project."""
        mode = entry.stat(follow_symlinks=False).st_mode
        is_usual = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        return is_usual and entry.name != _PYCACHE


class UploadFiles:
    """Selects the files of a folder to upload."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            InvalidProject: `root` is not a folder, or its `.cortexignore` cannot be read.
        """
        if not root.is_dir():
            raise InvalidProject(f"{root} is not a folder")
        lines = _lines(root / IGNORE_FILE)
        includes = [found["pattern"] for line in lines if (found := _INCLUDE.fullmatch(line))]
        self._ignored = GitIgnoreSpec.from_lines(lines)
        self._included = GitIgnoreSpec.from_lines(includes)
        self._is_venv = (root / "pyvenv.cfg").is_file()
        self._left_out: list[tuple[str, str]] = []

    def includes(self, name: str, entry: os.DirEntry[str]) -> bool:
        """Whether a file or folder belongs to the project. The caller does not enter a folder that
        does not."""
        path = f"{name}/" if entry.is_dir(follow_symlinks=False) else name
        if self._verdict(path) is True:
            return False
        kind = self._excluded_kind(name, entry)
        if kind is None or self._included.match_file(path):
            return True
        if kind:
            self._left_out.append((path, kind))
        return False

    def left_out(self) -> str | None:
        """A message that names the environments and caches that were left out; None if there are
        none."""
        if not self._left_out:
            return None
        found = sorted(self._left_out, key=lambda each: each[1] == _CACHE)
        shown = [f"{path} ({kind})" for path, kind in found[:_MAX_NAMED]]
        more = len(found) - len(shown)
        rest = f" and {more} more" if more > 0 else ""
        first = found[0][0]
        return (
            f"left out of the upload: {', '.join(shown)}{rest}; if jobs need it, add a line such "
            f"as !{first} to {IGNORE_FILE}"
        )

    def _verdict(self, path: str) -> bool | None:
        """The verdict of `.cortexignore` on a path, by the rules of git: True excludes the path,
        False includes it, None is no verdict. Only patterns that match the path itself count,
        because the caller enters no excluded folder. `GitIgnoreSpec.match_file` differs: it also
        counts patterns that match a folder above."""
        for pattern in reversed(self._ignored.patterns):
            found = None if pattern.include is None else pattern.match_file(path)
            if found is not None and _names_path(path, found.match):
                return pattern.include
        return None

    def _excluded_kind(self, name: str, entry: os.DirEntry[str]) -> str | None:
        """The kind of a file or folder that no project needs, for the message: "" for dot-files and
        byte code, which it does not name; None for files and folders that belong to the project."""
        # False for a link that cannot be followed, where `entry.is_dir` raises an error.
        if os.path.isdir(entry.path):  # noqa: PTH112
            if entry.name in _EXCLUDED:
                return _EXCLUDED[entry.name]
            if any(os.path.isfile(f"{entry.path}/{mark}") for mark in _VENV_MARKS):  # noqa: PTH113
                return _VENV
            if os.path.isdir(f"{entry.path}/conda-meta"):  # noqa: PTH112
                return "a conda environment"
            if self._is_venv and name in _ROOT_VENV_FOLDERS:
                return f"part of {_VENV}: the project's own folder is one"
        is_hidden = entry.name.startswith(".") and name != ".env"
        is_byte_code = entry.name == _PYCACHE or entry.name.endswith(_BYTE_CODE)
        return "" if is_hidden or is_byte_code else None


def _names_path(path: str, match: re.Match[str]) -> bool:
    """Whether a pattern matches the path itself and not a folder above it: the pattern's group ends
    where the matched folder does."""
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
