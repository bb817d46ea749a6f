"""Reads the jobs that other operators have changed, for the dispatcher: one read for all jobs that
were reported since the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from cortex.errors import StorageUnavailable
from cortex.spec.job import JobRecord
from cortex.store import Store
from cortex.system.background import retrying

_RETRY_DELAY_S = 1.0
_MAX_BATCH = 500


class Refresher:
    """All methods are called on the event loop."""

    def __init__(self, store: Store, on_read: Callable[[JobRecord], None]) -> None:
        """
        Args:
            on_read: called with each job as the store holds it, after `open`.
        """
        self._store = store
        self._on_read = on_read
        self._job_ids: set[str] = set()
        self._is_all = False
        self._requested = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to read. Requests that were made before are carried out."""
        self._task = asyncio.create_task(self._run(), name="refresh jobs")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def request(self, job_id: str) -> None:
        """Read a job again."""
        self._job_ids.add(job_id)
        self._requested.set()

    def request_all(self, job_ids: Iterable[str]) -> None:
        """Read these jobs and all jobs in progress again."""
        self._job_ids.update(job_ids)
        self._is_all = True
        self._requested.set()

    async def _run(self) -> None:
        while True:
            await self._requested.wait()
            self._requested.clear()
            await retrying(
                self._read,
                (StorageUnavailable,),
                delay_s=_RETRY_DELAY_S,
                warning="cannot read what other operators changed",
            )

    async def _read(self) -> None:
        if self._is_all:
            records = await self._store.jobs_in_progress()
            self._is_all = False
            for record in records:
                self._on_read(record)
        while self._job_ids:
            batch = [self._job_ids.pop() for _ in range(min(_MAX_BATCH, len(self._job_ids)))]
            try:
                records = await self._store.jobs(batch)
            except StorageUnavailable:
                self._job_ids.update(batch)
                raise
            for record in records:
                self._on_read(record)
