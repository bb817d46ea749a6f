"""What other operators stored of jobs, read for the dispatcher as it is told of it: all that was told
meanwhile in one read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from cortex.errors import StorageUnavailable
from cortex.spec.job import JobRecord
from cortex.store import Store

log = structlog.get_logger()

_AGAIN_S = 1.0
_MOST = 500  # in one read


class Refresher:
    """All of it happens on the event loop."""

    def __init__(self, store: Store, heard: Callable[[JobRecord], None]) -> None:
        """
        Args:
            heard: called with each job as it is stored, once `open` was called.
        """
        self._store = store
        self._heard = heard
        self._told: set[str] = set()
        self._all = False
        self._come = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to read; what was told before is not lost."""
        self._task = asyncio.create_task(self._run(), name="news")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def tell(self, job_id: str) -> None:
        """Something of a job changed."""
        self._told.add(job_id)
        self._come.set()

    def tell_all(self, job_ids: Iterable[str]) -> None:
        """Anything may have changed, of these jobs and of others."""
        self._told.update(job_ids)
        self._all = True
        self._come.set()

    async def _run(self) -> None:
        while True:
            await self._come.wait()
            self._come.clear()
            try:
                await self._read()
            except StorageUnavailable as error:
                log.warning("what other operators changed cannot be read", error=error.message)
                self._come.set()
                await asyncio.sleep(_AGAIN_S)

    async def _read(self) -> None:
        if self._all:
            found = await self._store.jobs_in_progress()
            self._all = False
            for record in found:
                self._heard(record)
        while self._told:
            some = [self._told.pop() for _ in range(min(_MOST, len(self._told)))]
            try:
                found = await self._store.jobs(some)
            except StorageUnavailable:
                self._told.update(some)
                raise
            for record in found:
                self._heard(record)
