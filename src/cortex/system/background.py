"""Work that goes on in the background of an event loop, or beside it. Used by `operator` and `engines`, where
several things are under way that nobody waits for.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import ParamSpec, TypeVar

import structlog

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")


async def in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What a function that blocks returns.

    Raises:
        OSError: the machine has no room for another thread; that passes, as other shortages do.
    """
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error


class Background:
    """Holds what it runs: the loop itself would let go of a task that nobody else does."""

    def __init__(self, failed: str) -> None:
        """
        Args:
            failed: what is logged of work that raises.
        """
        self.is_closed = False
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How much is under way."""
        return len(self._tasks)

    def run(self, work: Coroutine[object, object, None], name: str | None = None) -> None:
        """Let it be done; nothing is begun after `close`."""
        if self.is_closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def finish(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            # Not gather(): since Python 3.12 it returns without a turn of the loop where all tasks are
            # done, and `_done` would never run.
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Give up what is under way."""
        self.is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(self._failed, exc_info=error)
