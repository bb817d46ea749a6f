"""What a run leaves, and how two of them are compared. Used by `harness`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

NO_RESULT = "<no result>"
MAX_SHOWN = 2000


@dataclass(frozen=True)
class Outcome:
    """All that a run leaves."""

    exit_code: int
    result: Any
    log: str
    files: Mapping[str, Any]
    left: tuple[str, ...]
    """Segments of shared memory, and temporary files."""


def agree(job: Outcome, plain: Outcome, message: str | None) -> None:
    __tracebackhide__ = True
    told = []
    for name in (each.name for each in fields(Outcome)):
        expected, found = getattr(plain, name), getattr(job, name)
        if name == "files":
            expected, found = (
                {key: value for key, value in one.items() if other.get(key) != value}
                for one, other in ((expected, found), (found, expected))
            )
        if expected != found:
            told.append(f"{name}:\n  plain: {_shown(expected)}\n  job:   {_shown(found)}")
    if told:
        pytest.fail("\n".join([*told, f"message: {message!r}"]), pytrace=False)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < MAX_SHOWN else f"{text[:MAX_SHOWN]} ... ({len(text)} characters)"


_FRAMES = re.compile(
    r'^[ |+]*File "(?:<string>|[^"]*/cortex/worker/(?:\w+/)?\w+\.py)", line \d+(?:,? in .*)?'
    r"\n(?:[ |+]{4,}+(?!File ).*\n(?:[ |]*[~^]+\n)?)?",
    re.MULTILINE,
)

_NO_FRAMES = re.compile(
    r'^Traceback \(most recent call last\):\n(?!  File ".*", line \d+, in )', re.MULTILINE
)


def normalised(text: str, folders: Mapping[Path, str]) -> str:
    """The text without what may differ: frames of the driver and of the platform, folders, addresses, times."""
    text = _FRAMES.sub("", text)
    for folder, name in folders.items():
        text = text.replace(str(folder), f"<{name}>")
    text = _NO_FRAMES.sub("", text)
    text = re.sub(r"0x[0-9a-f]{4,}", "<address>", text)
    text = re.sub(r"(object refcount : )\d+", r"\1<count>", text)
    text = re.sub(r"\b\d+\.\d+ s\b", "<seconds> s", text)
    text = re.sub(r"line repeated \d+ more times", "line repeated many more times", text)
    text = re.sub(r"\bpsm_[0-9a-f]{8}\b", "<segment>", text)
    return re.sub(r"\btmp[a-z0-9_]{8}\b", "<temporary>", text)


def left_of(log: str, temporary: Path) -> tuple[str, ...]:
    named = sorted(set(re.findall(r"\bpsm_[0-9a-f]{8}\b", log)))
    found = ["segment" for name in named if (Path("/dev/shm") / name).exists()]
    for name in named:
        with contextlib.suppress(FileNotFoundError):
            (Path("/dev/shm") / name).unlink()
    for path in sorted(temporary.rglob("*")):
        name = str(path.relative_to(temporary))
        found.append(re.sub(r"\b(tmp|pymp-)[a-z0-9_]{8}", r"\1*", name))
    return tuple(sorted(found))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def running(mark: str) -> list[int]:
    """Processes whose environment or command line holds the mark."""
    sought = mark.encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            pid = int(entry)
            if sought in read(pid, "environ") + read(pid, "cmdline"):
                found.append(pid)
    return found


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
