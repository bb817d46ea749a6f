"""Archives the logs of finished jobs in the object store, and fetches them when the data folder
lacks a log. Opened by the app where an object store is configured; called by the dispatcher, the
log routes and retention.

Logs are sent in the background. The next start sends each log that has no mark: a crash in between
loses nothing. An operator that has been the leader sends the logs of the jobs that ended in its
terms: no other operator has them. The copy in the data folder is dropped a day after the log was
sent or read last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

import structlog

from cortex.errors import NoLeader, NotFound, StorageUnavailable
from cortex.joblog.folders import JobFolders
from cortex.objects import ObjectStore
from cortex.operator.dispatch.dispatcher import Dispatcher
from cortex.operator.logs.archived_files import ArchivedFiles
from cortex.spec.api import Limits
from cortex.spec.job import JobRecord
from cortex.store import Store

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()

_SENDERS = 4
_THREADS = 2 * _SENDERS  # half of them stay free for readers while the object store hangs
_MIN_RETRY_DELAY_S, _MAX_RETRY_DELAY_S = 1.0, 30.0
_DROP_INTERVAL_S = 3600


@dataclass(frozen=True, slots=True)
class _Finished:
    """What has to be known of a job to send its log."""

    api_id: str
    attempts: int


class Archive:
    """The archive of one operator. All methods are called on the event loop."""

    def __init__(
        self, files: ObjectStore, folders: JobFolders, store: Store, marks: Path, *, is_apart: bool
    ) -> None:
        """
        Args:
            marks: the folder `archived`.
            is_apart: whether other operators of the database may have data folders of their own.
        """
        self._copies = ArchivedFiles(files, folders, marks)
        self._store = store
        self._marks = marks
        self._is_apart = is_apart
        # In order, with the job where its end was reported a moment ago; the store has the others.
        self._waiting: dict[str, _Finished | None] = {}
        # Jobs of earlier terms. The database may not have them any more. Where operators have data
        # folders of their own, another operator may have led since, and the log here is incomplete.
        self._unsure: set[str] = set()
        self._sending: set[str] = set()
        # The logs of jobs that ended while this operator was the leader, until they are sent.
        self._whole: set[str] = set()
        self._left = asyncio.Event()
        self._sender_of_left: asyncio.Task[None] | None = None
        # One at a time sends, fetches, drops or removes a log: a mark must not outlive its log.
        self._job_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._more = asyncio.Event()
        self._retry_delay_s = _MIN_RETRY_DELAY_S
        self._dropped_at = float("-inf")
        self._limits: dict[str, int] = {}  # by version
        self._is_open = False
        # Threads of its own: a server that hangs must not occupy those of other work.
        self._threads = ThreadPoolExecutor(_THREADS, "archive")
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """While this operator does not lead, send what it owes from earlier terms. Call it once;
        `stop` ends it."""
        if self._is_apart:
            self._whole = await self._run(self._copies.whole)
            self._left.set()
            self._sender_of_left = asyncio.create_task(self._send_left(), name="archive rest")

    async def stop(self) -> None:
        """Send no more. The next start sends what is left."""
        if self._sender_of_left is not None:
            self._sender_of_left.cancel()
            await asyncio.gather(self._sender_of_left, return_exceptions=True)

    async def open(self, dispatcher: Dispatcher) -> None:
        """Send logs from now on, and the unsent logs of earlier terms first. The dispatcher must
        know all unfinished jobs."""
        self._is_open = True
        for job_id in await self._run(self._copies.not_sent):
            if dispatcher.live_jobs.find(job_id) is None and job_id not in self._waiting:
                self._waiting[job_id] = None
                if job_id not in self._whole:
                    self._unsure.add(job_id)
        self._more.set()
        for number in range(_SENDERS):
            self._tasks.append(asyncio.create_task(self._send_all(), name=f"archive {number}"))

    def end_term(self) -> None:
        """This operator is not the leader any longer: logs here may be incomplete."""
        self._is_open = False

    async def close(self) -> None:
        """Send no more. The next leader sends the logs that wait."""
        self.end_term()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._waiting.clear()
        self._sending.clear()
        self._unsure.clear()
        self._left.set()

    def end(self) -> None:
        """Shut down the archive's threads. Call it after `close`."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def finished(self, job: JobRecord) -> None:
        """The log of this job is complete. Called by the dispatcher."""
        if self._is_apart:
            self._whole.add(job.spec.job_id)
            with suppress(OSError):  # the disk is full: the next leader here is unsure of the log
                self._copies.note_whole(job.spec.job_id)
        self._waiting[job.spec.job_id] = _Finished(job.spec.api_id, job.losses + 1)
        self._more.set()

    async def has(self, job_id: str) -> bool:
        """Whether this operator can serve a finished job's log without the leader: all operators
        share one data folder, or this operator leads, or the log is archived."""
        if not self._is_apart or self._is_open or job_id in self._whole:
            return True
        return await self._run((self._marks / job_id).exists)

    async def bring_back(self, record: JobRecord) -> None:
        """Fetch the log of a finished job, unless it is on this machine.

        Raises:
            NotFound: it is neither on this machine nor in the object store.
            NoLeader: the last leader may not have sent it yet, and there is no leader now.
            StorageUnavailable: the object store does not answer.
        """
        job_id = record.spec.job_id
        async with self._lock(job_id):
            is_sure, is_leading = self._has_all_of(job_id), self._is_open
            is_local = await self._run(
                self._copies.bring_back, job_id, is_sure=is_sure, is_leading=is_leading
            )
        await self.drop_old()
        if not is_local and record.attempt:
            if self._is_apart and not self._is_open:
                raise NoLeader(
                    f"the log of the job {job_id} is not in the object store yet, and there is no "
                    "leader to ask for it; retry"
                )
            if self._is_apart:
                raise NotFound(
                    f"the log of the job {job_id} is not in the object store: the operator that "
                    "led when the job ended has stopped before it sent the log. If its data folder "
                    "exists, start it again: it sends the log then"
                )
            raise NotFound(
                f"the log of the job {job_id} is gone: the operator's machine was lost before the "
                "log was sent to the object store"
            )

    async def remove(self, job_ids: list[str]) -> None:
        """Remove the logs of these jobs from the object store, and their marks.

        Raises:
            StorageUnavailable: some logs may be left.
        """
        async with AsyncExitStack() as stack:
            for job_id in job_ids:
                await stack.enter_async_context(self._lock(job_id))
                self._waiting.pop(job_id, None)
                self._sending.discard(job_id)
                self._whole.discard(job_id)
            await self._run(self._copies.remove, job_ids)

    async def drop_old(self) -> None:
        """Drop the copies on this machine of archived logs that no client has read for a day. Does
        nothing if it ran within the last hour."""
        if time.monotonic() - self._dropped_at > _DROP_INTERVAL_S:
            self._dropped_at = time.monotonic()
            for job_id in await self._run(self._copies.old):
                async with self._lock(job_id):
                    await self._run(self._copies.drop, job_id)

    async def _send_all(self) -> None:
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            job_id = next(iter(self._waiting))
            job = self._waiting.pop(job_id)
            self._sending.add(job_id)
            async with self._lock(job_id):
                is_done = job_id not in self._sending or await self._send(job_id, job)
                self._sending.discard(job_id)
            if is_done:
                self._retry_delay_s = _MIN_RETRY_DELAY_S
            else:
                await asyncio.sleep(self._retry_delay_s)
                self._retry_delay_s = min(2 * self._retry_delay_s, _MAX_RETRY_DELAY_S)

    async def _send_left(self) -> None:
        while True:
            await self._left.wait()
            self._left.clear()
            delay_s = _MIN_RETRY_DELAY_S
            while self._whole and not self._is_open:
                for job_id in list(self._whole):
                    async with self._lock(job_id):
                        if self._is_open or job_id not in self._whole:
                            continue
                        await self._send(job_id, None)
                if self._whole:
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, _MAX_RETRY_DELAY_S)

    async def _send(self, job_id: str, job: _Finished | None) -> bool:
        """Send a log; whether nothing is left to do for it."""
        try:
            job = job or await self._stored(job_id)
            if job is not None:  # retention was about to remove the folder of any other job
                limit = await self._limit(job.api_id)
                is_sure = self._has_all_of(job_id)
                await self._run(self._copies.send, job_id, limit, job.attempts, is_sure=is_sure)
            self._unsure.discard(job_id)
            if job_id in self._whole:
                await self._run(self._copies.forget_whole, job_id)
                self._whole.discard(job_id)
        except (StorageUnavailable, OSError) as error:
            log.warning("log not archived yet; retrying", job=job_id, error=str(error))
            # Behind the others: only this log may fail. The job may be removed meanwhile.
            self._waiting[job_id] = None
            return False
        except Exception as error:  # the other logs have to be sent all the same
            self._whole.discard(job_id)
            log.error("log cannot be archived", job=job_id, exc_info=error)
        return True

    async def _stored(self, job_id: str) -> _Finished | None:
        job = await self._store.job(job_id)
        return None if job is None else _Finished(job.spec.api_id, job.losses + 1)

    async def _limit(self, api_id: str) -> int:
        """The `limits.log` of a version."""
        if api_id not in self._limits:
            spec = await self._store.version(api_id)
            self._limits[api_id] = (spec.limits if spec is not None else Limits()).log
        return self._limits[api_id]

    def _has_all_of(self, job_id: str) -> bool:
        """Whether a log here that has no mark is complete for certain."""
        is_own = job_id in self._whole or (self._is_open and job_id not in self._unsure)
        return not self._is_apart or is_own

    def _lock(self, job_id: str) -> asyncio.Lock:
        return self._job_locks.setdefault(job_id, asyncio.Lock())

    async def _run(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *arguments, **named))
