"""What a traced operator does as root: which of its system calls take a path through a folder that somebody else owns,
who may have put a link there by then. Read from what `strace` writes (`COMMAND`).
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_TRACED = "%file,fchown,fchdir,clone,clone3,fork,vfork,setuid,setreuid,setresuid"
COMMAND = ["strace", "-DDD", "-f", "-qq", "--seccomp-bpf", "-y", "-s", "4096", "-e", "signal=none"]
COMMAND += ["-e", f"trace={_TRACED}"]
"""Runs a command that keeps its pid; after it `-o FILE` and the command."""

_LINE = re.compile(r"(\d+) +(.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_UNFINISHED = " <unfinished ...>"
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|\?)")
_DESCRIPTOR = re.compile(r"(AT_FDCWD|\d+)<(.*)>(?:\(deleted\))?")
_FORKS = {"clone", "clone3", "fork", "vfork"}
_BECOMES = {"setuid": 0, "setreuid": 1, "setresuid": 1}
_CHOWNS = {"chown": 1, "lchown": 1, "fchown": 1, "fchownat": 2}
# A symbolic link may lead anywhere: it is none of this process's paths.
_NO_PATH = {"symlink": {0}, "symlinkat": {0}}
_NEVER_FOLLOW = {
    "mkdirat",
    "mknodat",
    "readlinkat",
    "renameat",
    "renameat2",
    "symlinkat",
    "unlinkat",
}
_KERNELS = ("/proc", "/sys", "/dev")
# What is behind it is no file of the kernel's.
_THROUGH = re.compile(r"/proc/[^/]+/(task/[^/]+/)?(fd/\d+|cwd|root)/.")


@dataclass
class Seen:
    """What a trace tells."""

    given: set[str] = field(default_factory=set)
    """The folders and files that root has given to the other user."""
    wrong: list[str] = field(default_factory=list)
    """Calls by root whose path goes through a folder of the other user's."""
    right: set[tuple[str, str]] = field(default_factory=set)
    """Calls by root in an open folder of the other user's that follow no link: their names, and the folders'."""
    calls: Counter[int] = field(default_factory=Counter)
    """By user."""


class Trace:
    """One, read from its first line to its last."""

    def __init__(self, uid: int, folder: str, seen: Seen) -> None:
        """
        Args:
            uid: of the other user, and of its group.
            folder: the first process's current one.
            seen: what traces before this one tell; added to.
        """
        self.seen = seen
        self._uid = uid
        self._first = (0, folder)
        self._states: dict[int, tuple[int, str]] = {}  # of each thread: its user and its folder
        self._parents: dict[int, int] = {}

    def read(self, lines: list[str]) -> None:
        """Read all of it."""
        calls = list(_calls(lines))
        for pid, name, _, result, _ in calls:
            if name in _FORKS and result > 0:
                self._parents[result] = pid
        for pid, name, arguments, result, line in calls:
            uid, folder = self._state(pid)
            self.seen.calls[uid] += 1
            if uid == 0:
                self._look(name, arguments, folder, line)
            if result >= 0:
                self._follow(pid, name, arguments)

    def _state(self, pid: int) -> tuple[int, str]:
        if pid not in self._states:
            parent = self._parents.get(pid)
            self._states[pid] = self._first if parent is None else self._state(parent)
        return self._states[pid]

    def _follow(self, pid: int, name: str, arguments: list[str]) -> None:
        """What a call that went well has changed."""
        uid, folder = self._state(pid)
        if name in _BECOMES:
            new = int(arguments[_BECOMES[name]])
            self._states[pid] = (uid if new < 0 else new, folder)
        elif name in ("chdir", "fchdir"):
            found = _DESCRIPTOR.fullmatch(arguments[0])
            to = found[2] if found else f"{Path(folder, _text(arguments[0]) or '')}"
            self._states[pid] = (uid, to)
        elif uid == 0 and name in _CHOWNS and arguments[_CHOWNS[name]] == str(self._uid):
            found = _DESCRIPTOR.fullmatch(arguments[0])
            if name == "fchown" and found:
                self.seen.given.add(found[2])
            else:
                self.seen.given |= {path for _, path in _paths(name, arguments, folder)}
        elif uid == 0 and name.startswith("rename"):
            before, after = (f"{Path(*each)}" for each in _paths(name, arguments, folder))
            moved = {p for p in self.seen.given if f"{p}/".startswith(f"{before}/")}
            self.seen.given |= {after + path[len(before) :] for path in moved}

    def _look(self, name: str, arguments: list[str], folder: str, line: str) -> None:
        paths = _paths(name, arguments, folder)
        if any(self._is_wrong(name, arguments, *each) for each in paths):
            self.seen.wrong.append(line)
            return
        theirs = {base for base, path in paths if _is_relative(path) and self._is_theirs(base)}
        self.seen.right |= {(name, base) for base in theirs}

    def _is_wrong(self, name: str, arguments: list[str], base: str, path: str) -> bool:
        full = f"{Path(base, path)}"
        if _THROUGH.match(full):
            return True
        if not path or full.startswith(_KERNELS):
            return False
        if _is_relative(path) and self._is_theirs(base):
            return "/" in path or not _follows_none(name, arguments)
        return self._is_theirs(str(Path(full).parent))

    def _is_theirs(self, folder: str) -> bool:
        """Whether somebody else may have put this folder, or what is in it, there."""
        path = Path(folder)
        each_on_the_way = (os.path.normpath(each) for each in (path, *path.parents))
        return any(each in self.seen.given or self._may_change(each) for each in each_on_the_way)

    def _may_change(self, folder: str) -> bool:
        try:
            about = os.lstat(folder)
        except OSError:
            return False
        if about.st_uid == self._uid:
            return True
        # The user's group has the same number.
        others = stat.S_IWOTH | (stat.S_IWGRP if about.st_gid == self._uid else 0)
        is_written_to = stat.S_ISDIR(about.st_mode) and about.st_mode & others
        return bool(is_written_to) and not about.st_mode & stat.S_ISVTX


def _calls(lines: list[str]) -> Iterator[tuple[int, str, list[str], int, str]]:
    begun: dict[str, str] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        pid, rest = found.groups()
        if rest.endswith(_UNFINISHED):
            begun[pid] = rest.removesuffix(_UNFINISHED)
            continue
        if resumed := _RESUMED.match(rest):
            rest = begun.pop(pid) + rest[resumed.end() :]
        call = _CALL.match(rest)
        if call is not None and call[3] != "?":
            yield int(pid), call[1], _split(call[2]), int(call[3]), f"{pid} {rest}"


def _split(arguments: str) -> list[str]:
    """At the commas that are in no text, list, or name of a descriptor."""
    found, begin, depth, is_text = [], 0, 0, False
    index = 0
    while index < len(arguments):
        each = arguments[index]
        if is_text:
            index += each == "\\"
            is_text = each != '"'
        elif each == '"':
            is_text = True
        elif each in "[{(<":
            depth += 1
        elif each in "]})>":
            depth -= 1
        elif each == "," and depth == 0:
            found.append(arguments[begin:index].strip())
            begin = index + 1
        index += 1
    return [*found, arguments[begin:].strip()]


def _is_relative(path: str) -> bool:
    return path != "" and not path.startswith("/")


def _text(argument: str) -> str | None:
    """The path that an argument is, if it is one."""
    if not argument.startswith('"'):
        return None
    return (
        argument.strip('"')
        .encode()
        .decode("unicode_escape")
        .encode("latin-1")
        .decode("utf-8", "replace")
    )


def _paths(name: str, arguments: list[str], folder: str) -> list[tuple[str, str]]:
    """Each path of a call, and the folder that it begins from if it is a relative one."""
    found = []
    for index, argument in enumerate(arguments):
        path = _text(argument)
        if path is None or index in _NO_PATH.get(name, ()):
            continue
        before = _DESCRIPTOR.fullmatch(arguments[index - 1]) if index else None
        is_base = before is not None and name != "inotify_add_watch"
        found.append((before[2] if before and is_base else folder, path))
    return found


def _follows_none(name: str, arguments: list[str]) -> bool:
    """Whether a call with one name in an open folder follows no link that has this name."""
    flags = " ".join(argument for argument in arguments if not argument.startswith('"'))
    if name == "openat":
        return "O_NOFOLLOW" in flags or ("O_CREAT" in flags and "O_EXCL" in flags)
    if name == "linkat":
        return "AT_SYMLINK_FOLLOW" not in flags
    return name in _NEVER_FOLLOW or "AT_SYMLINK_NOFOLLOW" in flags
