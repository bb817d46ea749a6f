"""A job's folder as the local engine sees it: `<root>/<job_id>/` with job.json, log, files/, start.N
and exit.N. Blocking and short; called by the engine, in threads where a disk is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Attempt
from cortex.spec.job import worker_job
from cortex.worker import cgroups, files, processes
from cortex.worker.messages import ExitRecord, StartRecord

HANDLE_VERSION = 1
CLEAN_S = 5.0


@dataclass(frozen=True)
class Fenced:
    """The attempt never ran, and never will."""


@dataclass(frozen=True)
class Alive:
    """Its supervisor is there; the pidfd is the caller's to close."""

    pidfd: int
    start: StartRecord


@dataclass(frozen=True)
class Gone:
    """Its supervisor is not there."""

    exit: ExitRecord | None
    start: StartRecord | None
    rebooted: bool


Found = Fenced | Alive | Gone


def handle() -> str:
    return json.dumps({"v": HANDLE_VERSION, "boot": processes.boot_id()})


def prepare(folder: Path, attempt: Attempt) -> None:
    """Lay out a job's folder before its supervisor is started."""
    (folder / "files").mkdir(parents=True, exist_ok=True)
    job = worker_job(attempt.spec, attempt.version.api)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


def started_gpus(folder: Path, attempt: int) -> list[int]:
    """The GPUs that a recovered attempt holds, as far as its record can be read now."""
    try:
        data = (folder / f"start.{attempt}").read_bytes()
    except OSError:
        return []
    return StartRecord.loads(data).gpus


def look(folder: Path, attempt: Attempt) -> Found:
    """What has become of an attempt. Fences one that has not started.

    Raises:
        OSError: the folder cannot be asked now.
    """
    rebooted = _boot(attempt.handle) != processes.boot_id()
    with _opened(folder, must_exist=not rebooted) as fd:
        if fd is None:
            return Gone(None, None, rebooted=True)
        start = _start(fd, attempt.number)
        if rebooted:
            return Gone(_exit(fd, attempt.number), start, rebooted=True)
        if start is None:
            fence = StartRecord(fenced=True).dumps()
            if files.create(fd, f"start.{attempt.number}", fence):
                return Fenced()
            start = _start(fd, attempt.number)
        if start is None or start.fenced:
            return Fenced()
        pidfd = processes.hold(start.pid, start.ticks)
        if pidfd is not None:
            return Alive(pidfd, start)
        return Gone(_exit(fd, attempt.number), start, rebooted=False)


def ended(folder: Path, attempt: int) -> Gone:
    """What a supervisor that has just ended has left.

    Raises:
        OSError: the folder cannot be asked now.
    """
    # Both are read through one open folder: it may be moved away, or back, in between.
    with _opened(folder, must_exist=True) as fd:
        assert fd is not None
        return Gone(_exit(fd, attempt), _start(fd, attempt), rebooted=False)


def supervised(folder: Path, attempt: int) -> bool:
    """Whether a supervisor of this attempt is alive, or may yet come."""
    try:
        data = (folder / f"start.{attempt}").read_bytes()
    except OSError:
        return folder.is_dir()
    start = StartRecord.loads(data)
    pidfd = None if start.fenced else processes.hold(start.pid, start.ticks)
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


def clean(job_id: str, groups: list[str]) -> None:
    """End whatever a killed supervisor has left of a job, and wait until it is gone."""
    until = time.monotonic() + CLEAN_S
    for group in groups:
        with contextlib.suppress(OSError):
            cgroups.put(f"{group}/cgroup.kill", "1")
    while time.monotonic() < until:
        left = processes.with_variable("CORTEX_JOB_ID", job_id)
        for group in groups:
            for pid in cgroups.members(group):
                about = processes.stat(pid)
                if about is not None:
                    left[pid] = about[2]
        if not left:
            break
        processes.send(left, signal.SIGKILL)
        time.sleep(0.01)
    for group in groups:
        cgroups.remove(group)


def append(log: Path, text: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(text.rstrip("\n") + "\n")


@contextlib.contextmanager
def _opened(folder: Path, *, must_exist: bool):  # type: ignore[no-untyped-def]  # the decorator's type is the return's
    try:
        fd = files.open_folder(str(folder))
    except FileNotFoundError:
        if must_exist or not folder.parent.is_dir():
            raise
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _boot(handle: str) -> str:
    try:
        boot = json.loads(handle)["boot"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(boot)


def _start(folder: int, attempt: int) -> StartRecord | None:
    data = files.read(folder, f"start.{attempt}")
    return StartRecord.loads(data) if data else None


def _exit(folder: int, attempt: int) -> ExitRecord | None:
    data = files.read(folder, f"exit.{attempt}")
    return ExitRecord.loads(data) if data else None
