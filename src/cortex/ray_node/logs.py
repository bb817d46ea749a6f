"""Jobs' logs on a node: read in pieces, and watched so that what is written is told at once. Called by
the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from asyncinotify import Inotify, Mask, Watch

from cortex.engines.ray.messages import LogPiece
from cortex.worker import files
from cortex.worker.supervisor import logfile

_CHANGES = Mask.MODIFY | Mask.CREATE


class LogWatch:
    """Tells whenever a log in the jobs' folders grows."""

    def __init__(self, grown: Callable[[], object]) -> None:
        self._grown = grown
        self._inotify: Inotify | None = None
        self._watches: dict[str, Watch] = {}
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        with contextlib.suppress(OSError):  # the user has too many: logs are looked at now and then
            self._inotify = Inotify()
            self._task = asyncio.create_task(self._watch(self._inotify))

    def add(self, job_id: str, folder: Path) -> None:
        if self._inotify is not None and job_id not in self._watches:
            with contextlib.suppress(OSError):  # there are too many: it is looked at now and then
                self._watches[job_id] = self._inotify.add_watch(folder, _CHANGES)

    def remove(self, job_id: str) -> None:
        watch = self._watches.pop(job_id, None)
        if watch is not None and self._inotify is not None:
            with contextlib.suppress(OSError):  # the folder is gone, and its watch with it
                self._inotify.rm_watch(watch)

    async def _watch(self, inotify: Inotify) -> None:
        async for event in inotify:
            if event.name is not None and event.name.name == logfile.NAME:
                self._grown()


def piece(folder: Path, offset: int, most: int, limit: int) -> LogPiece:
    """Up to `most` bytes of a job's log from an offset on. The job may have put something else in its
    place, which is not followed.

    Args:
        limit: the `limits.log` of the API's version.
    """
    nothing = LogPiece(offset, b"", offset, None)
    try:
        folder_fd = files.open_folder(str(folder))
    except OSError:
        return nothing
    try:
        fd = _open(folder_fd)
        if fd is None:
            return nothing
        try:
            data = os.pread(fd, max(0, min(most, os.fstat(fd).st_size - offset)), offset)
            # Asked after reading: what is being cut meanwhile reads as zeros.
            record = files.read(folder_fd, logfile.CUT)
            gone = logfile.find_gap(record, os.fstat(fd).st_size, limit)
        finally:
            os.close(fd)
    finally:
        os.close(folder_fd)
    cut = None if gone is None else gone.dumps()
    if gone is None or offset >= gone.end:
        return LogPiece(offset, data, offset + len(data), cut)
    data = data[: max(0, gone.start - offset)]
    end = offset + len(data)
    return LogPiece(offset, data, gone.end if end >= gone.start else end, cut)


def _open(folder: int) -> int | None:
    try:
        return logfile.open_to_read(folder)
    except OSError:
        return None
