"""Follows a job's log to its end, as Server-Sent Events. Called by the log routes."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from cortex.joblog.reader import REMOVED, REPLACED, Log, is_replaced, log_exists, read
from cortex.joblog.watch import FileWatch

_CHUNK_BYTES = 64 * 1024
_KEEP_ALIVE_S = 15


class Writer(Protocol):
    """A job in progress, whose processes may still write its log."""

    async def changed(self) -> None: ...


async def follow(
    log: Log, offset: int, find_writer: Callable[[], Writer | None], watcher: FileWatch
) -> AsyncIterator[tuple[int, str] | None]:
    """Yields a log from a byte offset on: (offset after it, text) for each piece as the job writes
    it, and None after a while without one. Ends when the last process of the job has exited and all
    is read. Replaces bytes that are not UTF-8."""
    path, grown = log.path, asyncio.Event()
    first_offset = offset
    watching = False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        while True:
            grown.clear()
            watching = watching or watcher.watch_open_log(path, grown.set)
            # Before the read: what the job writes until its end is read for certain.
            writer = find_writer()
            while (piece := await asyncio.to_thread(read, log, offset, _CHUNK_BYTES)).data:
                offset = piece.end
                if piece.is_marker:
                    decoder.reset()  # the gap has the rest of a character
                text = decoder.decode(piece.data)
                incomplete_bytes = len(decoder.getstate()[0])
                if text:
                    yield offset - incomplete_bytes, text
            if writer is None:
                if rest := decoder.decode(b"", final=True):
                    yield offset, rest
                if offset > first_offset and not await asyncio.to_thread(log_exists, path):
                    yield offset, REMOVED
                elif offset == first_offset and await asyncio.to_thread(is_replaced, path):
                    yield offset, REPLACED
                return
            if not watching and watcher.watch_open_log(path, grown.set):
                watching = True  # the log was created meanwhile, and may not grow for a long time
                continue
            if not await _first_of(grown.wait(), _changed(find_writer)):
                yield None
    finally:
        if watching:
            watcher.remove(path, grown.set)


async def _changed(find_writer: Callable[[], Writer | None]) -> None:
    """Return at the writer's next change, or at once if it has ended since the last look-up."""
    if (writer := find_writer()) is not None:
        await writer.changed()


def event(name: str, data: str, event_id: int | None = None) -> str:
    """One Server-Sent Event; its data is one line of JSON text."""
    numbered = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n{numbered}data: {data}\n\n"


async def _first_of(*waits: Awaitable[object]) -> bool:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(
            tasks, timeout=_KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
        )
        return bool(done)
    finally:  # `asyncio.wait` does not cancel its tasks when its caller is cancelled
        for task in tasks:
            task.cancel()
