"""The outcome of a run, and the comparison of two outcomes. Used by `harness`."""

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
    """The observable outcome of a run."""

    exit_code: int
    result: Any
    log: str
    files: Mapping[str, Any]
    leftovers: tuple[str, ...]
    """Segments of shared memory and temporary files that exist after the run."""


def assert_agree(job: Outcome, plain: Outcome, message: str | None) -> None:
    """Fail with all differences between the two, and the job's message."""
    __tracebackhide__ = True
    differences = []
    for name in (each.name for each in fields(Outcome)):
        expected, actual = getattr(plain, name), getattr(job, name)
        if name == "files":
            expected, actual = (
                {key: value for key, value in one.items() if other.get(key) != value}
                for one, other in ((expected, actual), (actual, expected))
            )
        if expected != actual:
            differences.append(f"{name}:\n  plain: {_shown(expected)}\n  job:   {_shown(actual)}")
    if differences:
        pytest.fail("\n".join([*differences, f"message: {message!r}"]), pytrace=False)


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
    """The text without parts that may differ: frames of the driver and of the platform, folders,
    addresses, times."""
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


def leftovers_of(log: str, temporary: Path) -> tuple[str, ...]:
    """The log's memory segments, which are removed, and the files of the temporary folder."""
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
    """The files below a folder, without byte code."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def processes_of_run(run_id: str) -> list[int]:
    """The processes whose environment or command line contains the id of the run."""
    sought = run_id.encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            pid = int(entry)
            if sought in proc_file(pid, "environ") + proc_file(pid, "cmdline"):
                found.append(pid)
    return found


def proc_file(pid: int, name: str) -> bytes:
    """A file of /proc/<pid>; empty if the process has exited."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
