"""What of a folder is no part of its project, and is not uploaded: what `.cortexignore` excludes, dot-files, byte
code, environments and caches of tools. Called by `pack`.

A line such as `!node_modules/`, whose last part is a name and no pattern, brings back what is left out of itself.
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
    """Chooses all of a project that was unpacked, without what has come there since and cannot be in one."""

    def take(self, name: str, entry: os.DirEntry[str]) -> bool:
        """Whether it is a part of the project."""
        mode = entry.stat(follow_symlinks=False).st_mode
        is_usual = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        return is_usual and entry.name != _PYCACHE


class Chosen:
    """Chooses what of a folder is uploaded."""

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
        """Whether a file or folder is a part of the project; what is in a folder that is none is not asked for."""
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
        """What was left out of itself and may be missed, in words."""
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
        """What `.cortexignore` says of a path, as git does: True leaves it out, False brings it back, None is nothing.
        What is in a folder that is left out is not asked for, and of one that is taken only the path itself counts;
        `GitIgnoreSpec.match_file` takes single paths, for which a folder above them decides, too."""
        for pattern in reversed(self._ignored.patterns):
            found = None if pattern.include is None else pattern.match_file(path)
            if found is not None and _is_of(path, found.match):
                return pattern.include
        return None

    def _why_left_out(self, name: str, entry: os.DirEntry[str]) -> str | None:
        """The words for what is left out, none where it goes without saying; None for what is taken."""
        if entry.is_dir():
            if entry.name in _NAMED:
                return _NAMED[entry.name]
            if any(Path(entry.path, mark).is_file() for mark in _VENV_MARKS):
                return _VENV
            if Path(entry.path, "conda-meta").is_dir():
                return "a conda environment"
            if self._is_venv and name in _OF_ROOT_VENV:
                return f"{_VENV}, which the project's own folder is"
        is_hidden = entry.name.startswith(".") and name != ".env"
        is_made = entry.name == _PYCACHE or entry.name.endswith(_BYTE_CODE)
        return "" if is_hidden or is_made else None


def _is_of(path: str, match: re.Match[str]) -> bool:
    """Whether a pattern is of a path, not of a folder above it: its group, if it has any, ends with the folder."""
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
