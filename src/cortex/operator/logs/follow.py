"""A job's log: from a byte offset, or followed to its end as Server-Sent Events."""

from __future__ import annotations

import asyncio
import codecs
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from asyncinotify import Inotify, Mask, Watch

from cortex.worker import beneath
from cortex.worker.messages import LogCut
from cortex.worker.messages import size as readable
from cortex.worker.supervisor import logfile

_CHUNK_BYTES = 64 * 1024
_KEEP_ALIVE_S = 15
_MOST_RECORD = 4096

REMOVED = "[cortex: the log was removed while it was read]\n"
REPLACED = "[cortex: the log is not shown, for the job has put something else in its place]\n"


@dataclass(frozen=True)
class Log:
    """A job's log: what there is of it, beyond which nothing is read, whatever its file is."""

    path: Path
    limit: int
    """The `limits.log` of the API's version."""
    attempts: int = 1
    """That the job has had."""


class LogWatcher:
    """Wakes followers when a log grows. One inotify instance for all: a user may have few (128)."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._followers: defaultdict[Path, set[asyncio.Event]] = defaultdict(set)
        self._watches: dict[Path, Watch] = {}
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="log watcher")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._inotify.close()

    def add(self, path: Path, follower: asyncio.Event) -> bool:
        """Set `follower` at every change of a file; False when there is no such file yet."""
        try:
            with opened(path) as fd:
                if fd is None:
                    return False
                # Not by its name, in whose place the job may have put another file.
                watch = self._inotify.add_watch(f"/proc/self/fd/{fd}", Mask.MODIFY)
        except FileNotFoundError:
            return False
        watch.path = path
        self._watches[path] = watch
        self._followers[path].add(follower)
        return True

    def remove(self, path: Path, follower: asyncio.Event) -> None:
        """Undo `add`."""
        self._followers[path].discard(follower)
        if not self._followers[path]:
            del self._followers[path]
            with suppress(OSError):  # the file may be gone, and its watch with it
                self._inotify.rm_watch(self._watches.pop(path))

    async def _watch(self) -> None:
        async for event in self._inotify:
            if event.path is not None:
                for follower in self._followers.get(event.path, ()):
                    follower.set()


class Followed(Protocol):
    """Whoever knows when a job's processes are gone."""

    def in_progress(self, job_id: str) -> bool: ...

    async def change(self, job_id: str) -> None: ...


async def follow(
    job_id: str, log: Log, offset: int, jobs: Followed, watcher: LogWatcher
) -> AsyncIterator[tuple[int, str] | None]:
    """The log from a byte offset on: (offset after it, text) for each piece as it is written, None
    when nothing came for a while; it ends when the last process of the job is gone and all was
    read. Bytes that are no UTF-8 are replaced."""
    path, grown = log.path, asyncio.Event()
    begun_at = offset
    watching = False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        while True:
            grown.clear()
            watching = watching or watcher.add(path, grown)
            # Asked before reading: what is written until the end is then surely read.
            ended = not jobs.in_progress(job_id)
            while (piece := await asyncio.to_thread(read, log, offset, _CHUNK_BYTES)).data:
                offset = piece.end
                if piece.is_marker:
                    decoder.reset()  # the rest of a character that was cut in two is gone
                text = decoder.decode(piece.data)
                held_back = len(decoder.getstate()[0])
                if text:
                    yield offset - held_back, text
            if ended:
                if rest := decoder.decode(b"", final=True):
                    yield offset, rest
                if offset > begun_at and not await asyncio.to_thread(is_there, path):
                    yield offset, REMOVED
                elif offset == begun_at and await asyncio.to_thread(is_replaced, path):
                    yield offset, REPLACED
                return
            if not watching and watcher.add(path, grown):
                watching = True  # it came meanwhile, and nothing else need happen for long
                continue
            if not await _first_of(grown.wait(), jobs.change(job_id)):
                yield None
    finally:
        if watching:
            watcher.remove(path, grown)


def event(name: str, data: str, event_id: int | None = None) -> str:
    """One Server-Sent Event; its data is one line of JSON text."""
    numbered = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n{numbered}data: {data}\n\n"


@dataclass(frozen=True)
class Piece:
    """Some bytes of a log, and the offset after them."""

    data: bytes
    end: int
    is_marker: bool = False
    """Whether these stand for bytes that are gone."""


def read(log: Log, offset: int, size: int) -> Piece:
    """Up to `size` bytes of a log from an offset on; none where there is no log yet. For the part
    that a log over its limit has lost there is one line that says so."""
    with opened(log.path) as fd:
        if fd is None:
            return Piece(b"", offset)
        # No file takes a read that goes on beyond the largest offset.
        data = os.pread(fd, max(0, min(size, os.fstat(fd).st_size - offset)), offset)
        # Asked after reading: what is being cut meanwhile reads as zeros.
        gone = lost(log, fd)
    if gone is not None and gone.start <= offset < gone.end:
        return Piece(_marker(gone), gone.end, is_marker=True)
    if gone is not None and offset < gone.start:
        data = data[: gone.start - offset]
    return Piece(data, offset + len(data))


@contextmanager
def opened(path: Path) -> Iterator[int | None]:
    """The file descriptor of a log; None where there is none yet, or where the job has put something
    else in its place: a link would lead to what only the operator may read."""
    fd = None
    with suppress(FileNotFoundError), beneath.opened(str(path.parent)) as folder:
        fd = logfile.open_to_read(folder, path.name)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def is_there(path: Path) -> bool:
    """Whether there is a log."""
    with opened(path) as fd:
        return fd is not None


def is_replaced(path: Path) -> bool:
    """Whether there is something in place of a log that is none."""
    with suppress(FileNotFoundError), beneath.opened(str(path.parent)) as folder:
        return beneath.stat(folder, path.name) is not None and not is_there(path)
    return False


def length(log: Log) -> int:
    """The bytes that a log has had so far."""
    with opened(log.path) as fd:
        return 0 if fd is None else os.fstat(fd).st_size


def lost(log: Log, fd: int) -> LogCut | None:
    """The part that a log has lost, if any.

    Args:
        fd: of its open file.
    """
    with opened(log.path.with_name(logfile.CUT)) as record:
        data = b"" if record is None else os.pread(record, _MOST_RECORD, 0)
    return logfile.find_gap(data, os.fstat(fd).st_size, log.limit, log.attempts)


def _marker(gone: LogCut) -> bytes:
    amount = readable(gone.end - gone.start)
    return (
        f"[cortex: {amount} of the log are gone: limits.log is {readable(gone.limit)}]\n".encode()
    )


async def _first_of(*waits: Awaitable[object]) -> bool:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(
            tasks, timeout=_KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
        )
        return bool(done)
    finally:  # also where whoever waits is cancelled: `wait` leaves them as they are
        for task in tasks:
            task.cancel()
