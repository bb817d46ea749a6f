"""Work in the background of an event loop, or in threads beside it.

Used by `operator` and `engines` for work that no caller awaits.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from typing import ParamSpec, TypeVar

import structlog

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")


async def in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a blocking function in a thread; what it returns.

    Raises:
        OSError: the machine cannot start another thread now; a shortage that may pass.
    """
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error


async def retrying(
    work: Callable[[], Awaitable[R]],
    errors: tuple[type[Exception], ...],
    *,
    delay_s: float,
    warning: str,
    **fields: object,
) -> R:
    """Run `work` until it raises none of the errors; what it returns.

    Args:
        errors: failures that may pass. One is logged unless it repeats the failure before. Other
            exceptions are raised.
        delay_s: the time between a failure and the next attempt.
        warning: the log event for a failure.
        fields: further fields of that event.
    """
    logged = None
    while True:
        try:
            return await work()
        except errors as error:
            if str(error) != logged:
                logged = str(error)
                log.warning(warning, **fields, error=logged)
        await asyncio.sleep(delay_s)


class Background:
    """Runs tasks and keeps references to them: the loop itself has only weak ones."""

    def __init__(self, failed: str) -> None:
        """
        Args:
            failed: the log event for a task that raises.
        """
        self.is_closed = False
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """The number of running tasks."""
        return len(self._tasks)

    def run(self, work: Coroutine[object, object, None], name: str | None = None) -> None:
        """Run a coroutine as a task; after `close`, discard it."""
        if self.is_closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def finish(self) -> None:
        """Wait until all tasks are done, also those that tasks start."""
        while self._tasks:
            # Not gather(): since Python 3.12 it returns without a turn of the loop where all tasks
            # are done, and `_done` would never run.
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel all tasks."""
        self.is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(self._failed, exc_info=error)
