"""Finds the system calls of root that use a path through a folder of another user.

That user may have put a link there. The input is what `strace` (`COMMAND`) writes.
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
"""The prefix of a traced command, which gets the pid of `strace`; `-o FILE` comes in between."""

_LINE = re.compile(r"(\d+) +(.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_UNFINISHED = " <unfinished ...>"
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|\?)")
_DESCRIPTOR = re.compile(r"(AT_FDCWD|\d+)<(.*)>(?:\(deleted\))?")
_FORKS = {"clone", "clone3", "fork", "vfork"}
_BECOMES = {"setuid": 0, "setreuid": 1, "setresuid": 1}
_CHOWNS = {"chown": 1, "lchown": 1, "fchown": 1, "fchownat": 2}
# The target of a symbolic link: text for the kernel, which resolves no path in this call.
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
_KERNEL_PATHS = ("/proc", "/sys", "/dev")
# These paths below /proc lead to other file systems.
_OUT_OF_PROC = re.compile(r"/proc/[^/]+/(task/[^/]+/)?(fd/\d+|cwd|root)/.")


@dataclass
class Findings:
    """The results of a trace."""

    given: set[str] = field(default_factory=set)
    """The folders and files that root has given to the other user (chown)."""
    wrong: list[str] = field(default_factory=list)
    """Calls of root whose path leads through a folder of the other user."""
    right: set[tuple[str, str]] = field(default_factory=set)
    """Calls of root in an open folder of the other user that follow no link: call and folder."""
    calls: Counter[int] = field(default_factory=Counter)
    """The number of calls by user id."""


class Trace:
    """Reads one trace from its first line to its last."""

    def __init__(self, uid: int, folder: str, findings: Findings) -> None:
        """
        Args:
            uid: the id of the other user, and of the user's group.
            folder: the current folder of the first process.
            findings: the results of earlier traces; this trace adds its own.
        """
        self.findings = findings
        self._uid = uid
        self._first = (0, folder)
        self._states: dict[int, tuple[int, str]] = {}  # by thread: user and current folder
        self._parents: dict[int, int] = {}

    def read(self, lines: list[str]) -> None:
        """Read all lines of the trace."""
        calls = list(_calls(lines))
        for pid, name, _, result, _ in calls:
            if name in _FORKS and result > 0:
                self._parents[result] = pid
        for pid, name, arguments, result, line in calls:
            uid, folder = self._state(pid)
            self.findings.calls[uid] += 1
            if uid == 0:
                self._check(name, arguments, folder, line)
            if result >= 0:
                self._follow(pid, name, arguments)

    def _state(self, pid: int) -> tuple[int, str]:
        if pid not in self._states:
            parent = self._parents.get(pid)
            self._states[pid] = self._first if parent is None else self._state(parent)
        return self._states[pid]

    def _follow(self, pid: int, name: str, arguments: list[str]) -> None:
        """Apply the effects of a successful call."""
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
                self.findings.given.add(found[2])
            else:
                self.findings.given |= {path for _, path in _paths(name, arguments, folder)}
        elif uid == 0 and name.startswith("rename"):
            before, after = (f"{Path(*each)}" for each in _paths(name, arguments, folder))
            moved = {p for p in self.findings.given if f"{p}/".startswith(f"{before}/")}
            self.findings.given |= {after + path[len(before) :] for path in moved}

    def _check(self, name: str, arguments: list[str], folder: str, line: str) -> None:
        paths = _paths(name, arguments, folder)
        if any(self._is_wrong(name, arguments, *each) for each in paths):
            self.findings.wrong.append(line)
            return
        theirs = {base for base, path in paths if _is_relative(path) and self._is_theirs(base)}
        self.findings.right |= {(name, base) for base in theirs}

    def _is_wrong(self, name: str, arguments: list[str], base: str, path: str) -> bool:
        full = f"{Path(base, path)}"
        if _OUT_OF_PROC.match(full):
            return True
        if not path or full.startswith(_KERNEL_PATHS):
            return False
        if _is_relative(path) and self._is_theirs(base):
            return "/" in path or not _follows_none(name, arguments)
        return self._is_theirs(str(Path(full).parent))

    def _is_theirs(self, folder: str) -> bool:
        """Whether the other user may have put this folder or its contents there."""
        path = Path(folder)
        each_on_path = (os.path.normpath(each) for each in (path, *path.parents))
        return any(each in self.findings.given or self._may_change(each) for each in each_on_path)

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
    unfinished: dict[str, str] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        pid, rest = found.groups()
        if rest.endswith(_UNFINISHED):
            unfinished[pid] = rest.removesuffix(_UNFINISHED)
            continue
        if resumed := _RESUMED.match(rest):
            rest = unfinished.pop(pid) + rest[resumed.end() :]
        call = _CALL.match(rest)
        if call is not None and call[3] != "?":
            yield int(pid), call[1], _split(call[2]), int(call[3]), f"{pid} {rest}"


def _split(arguments: str) -> list[str]:
    """Split at the commas outside of strings, lists and names of descriptors."""
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
    """The path in an argument, or None if the argument is no string."""
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
    """Each path of a call, after the folder from which a relative path begins."""
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
    """Whether a call on a single name in an open folder does not follow a link with this name."""
    flags = " ".join(argument for argument in arguments if not argument.startswith('"'))
    if name == "openat":
        return "O_NOFOLLOW" in flags or ("O_CREAT" in flags and "O_EXCL" in flags)
    if name == "linkat":
        return "AT_SYMLINK_FOLLOW" not in flags
    return name in _NEVER_FOLLOW or "AT_SYMLINK_NOFOLLOW" in flags
