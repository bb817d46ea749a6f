"""Exit records, as they are made: for attempts whose supervising process answers to another operator. Where
that one hangs instead of having ended, the process stays when its job is over, and its end tells nothing.
Called by the local engine alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from asyncinotify import Inotify, Mask, Watch


class ExitRecordWatch:
    """One inotify instance for all, made when it is needed first: a user may have few (128)."""

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._task: asyncio.Task[None] | None = None
        self._awaited: dict[Path, tuple[Watch, Callable[[], None]]] = {}

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._inotify is not None:
            self._inotify.close()

    def add(self, record: Path, made: Callable[[], None]) -> None:
        """Call `made` once the record is there; one that is there already is not told.

        Raises:
            OSError: its folder cannot be watched.
        """
        if self._inotify is None:
            self._inotify = Inotify()
            self._task = asyncio.create_task(self._run(self._inotify), name="exit records")
        watch = self._inotify.add_watch(record.parent, Mask.MOVED_TO | Mask.ONLYDIR)
        self._awaited[record] = (watch, made)

    def remove(self, record: Path) -> None:
        """Undo `add`, if it was done."""
        watch, _ = self._awaited.pop(record, (None, None))
        if watch is not None and self._inotify is not None:
            with suppress(OSError):  # the folder may be gone, and its watch with it
                self._inotify.rm_watch(watch)

    async def _run(self, inotify: Inotify) -> None:
        async for event in inotify:
            _, made = self._awaited.get(event.path or Path(), (None, None))
            if made is not None:
                made()
