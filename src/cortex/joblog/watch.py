"""Reports when logs grow and when exit records appear, by inotify(7). Called by the operator's log
routes, by the local engine and by the agents of nodes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from asyncinotify import Inotify, Mask, Watch

from cortex.joblog.reader import opened

Callback = Callable[[], object]

_GROWTH = Mask.MODIFY | Mask.CREATE
# A supervisor renames a record into place (MOVED_TO) or links it there (CREATE).
_APPEARANCE = Mask.MOVED_TO | Mask.CREATE


@dataclass(eq=False)
class _Watched:
    watch: Watch
    mask: Mask
    callbacks: set[Callback] = field(default_factory=set)


class FileWatch:
    """One inotify instance for any number of files: a user may have few instances (128 by default).
    All methods are called on the event loop. Adding a callback twice has no effect.

    A callback is a hint: the kernel drops events when its queue is full, and a job can create a
    file of any name in its folder.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of the task that reads the events.
        """
        self._name = name
        self._inotify: Inotify | None = None
        self._task: asyncio.Task[None] | None = None
        self._watched: dict[Path, _Watched] = {}
        self._uses: Counter[Watch] = Counter()  # files of one folder share its watch

    def open(self) -> None:
        """Create the inotify instance; otherwise the first file creates it.

        Raises:
            OSError: the user has no instance left.
        """
        if self._inotify is None:
            self._inotify = Inotify()
            self._task = asyncio.create_task(self._dispatch(self._inotify), name=self._name)

    async def close(self) -> None:
        """Call no callback from now on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def watch_open_log(self, path: Path, grown: Callback) -> bool:
        """Call `grown` whenever a log grows; False, and nothing is watched, where no log exists.
        The file itself is watched, not its name: the job may put another file in its place.

        Raises:
            OSError: the log cannot be watched.
        """
        self.open()
        assert self._inotify is not None
        try:
            with opened(path) as file:
                if file is None:
                    return False
                watch = self._inotify.add_watch(f"/proc/self/fd/{file.fd}", Mask.MODIFY)
        except FileNotFoundError:
            return False
        watch.path = path
        self._add(path, watch, Mask.MODIFY, grown)
        return True

    def watch_growth(self, path: Path, grown: Callback) -> None:
        """Call `grown` when this file is created in its folder, and whenever it grows.

        Raises:
            OSError: its folder cannot be watched.
        """
        self._watch_name(path, _GROWTH, grown)

    def watch_appearance(self, path: Path, appeared: Callback) -> None:
        """Call `appeared` whenever a file gets this name, by creation, link or rename. A file that
        exists already is not reported: look after this returns.

        Raises:
            OSError: its folder cannot be watched.
        """
        self._watch_name(path, _APPEARANCE, appeared)

    def remove(self, path: Path, callback: Callback) -> None:
        """Do not call `callback` for this file any more. Harmless where it was not added."""
        watched = self._watched.get(path)
        if watched is None:
            return
        watched.callbacks.discard(callback)
        if not watched.callbacks:
            del self._watched[path]
            self._release(watched.watch)

    def _watch_name(self, path: Path, mask: Mask, callback: Callback) -> None:
        self.open()
        assert self._inotify is not None
        # MASK_ADD: another file of the folder may be watched for other events.
        watch = self._inotify.add_watch(path.parent, mask | Mask.ONLYDIR | Mask.MASK_ADD)
        self._add(path, watch, mask, callback)

    def _add(self, path: Path, watch: Watch, mask: Mask, callback: Callback) -> None:
        watched = self._watched.get(path)
        if watched is None or watched.watch is not watch:
            callbacks = set() if watched is None else watched.callbacks
            self._watched[path] = _Watched(watch, mask, callbacks)
            self._uses[watch] += 1
            if watched is not None:  # its file was replaced by another one
                self._release(watched.watch)
        self._watched[path].callbacks.add(callback)

    def _release(self, watch: Watch) -> None:
        self._uses[watch] -= 1
        if self._uses[watch]:
            return
        del self._uses[watch]
        if self._inotify is not None:
            with suppress(OSError):  # the file may be removed, and its watch with it
                self._inotify.rm_watch(watch)

    async def _dispatch(self, inotify: Inotify) -> None:
        async for event in inotify:
            watched = self._watched.get(event.path or Path())
            if watched is not None and event.mask & watched.mask:
                for callback in tuple(watched.callbacks):
                    callback()
