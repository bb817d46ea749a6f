"""A job's log: from a byte offset, or followed to its end as Server-Sent Events."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from pathlib import Path

from asyncinotify import Inotify, Mask, Watch

from cortex.operator.dispatcher import Dispatcher

_CHUNK_BYTES = 64 * 1024
_KEEP_ALIVE_S = 15


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
            self._watches[path] = self._inotify.add_watch(path, Mask.MODIFY)
        except FileNotFoundError:
            return False
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


async def follow(
    job_id: str, path: Path, offset: int, dispatcher: Dispatcher, watcher: LogWatcher
) -> AsyncIterator[tuple[int, str] | None]:
    """The log from a byte offset on: (offset after it, text) for each piece as it is written, None
    when nothing came for a while; it ends when the last process of the job is gone and all was
    read. Bytes that are no UTF-8 are replaced."""
    grown = asyncio.Event()
    watching = False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        while True:
            grown.clear()
            watching = watching or watcher.add(path, grown)
            # Asked before reading: what is written until the end is then surely read.
            ended = not dispatcher.in_progress(job_id)
            while chunk := await asyncio.to_thread(read, path, offset, _CHUNK_BYTES):
                offset += len(chunk)
                text = decoder.decode(chunk)
                held_back = len(decoder.getstate()[0])
                if text:
                    yield offset - held_back, text
            if ended:
                if rest := decoder.decode(b"", final=True):
                    yield offset, rest
                return
            if not await _first_of(grown.wait(), dispatcher.change(job_id)):
                yield None
    finally:
        if watching:
            watcher.remove(path, grown)


def event(name: str, data: object, event_id: int | None = None) -> str:
    """One Server-Sent Event; its data is one line of JSON."""
    numbered = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n{numbered}data: {json.dumps(data)}\n\n"


def read(path: Path, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file from an offset on; none where there is no file yet."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except FileNotFoundError:
        return b""


async def _first_of(*waits: Awaitable[object]) -> bool:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(
        tasks, timeout=_KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
    )
    for task in pending:
        task.cancel()
    return bool(done)
