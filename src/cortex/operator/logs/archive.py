"""The logs of finished jobs in the store of files, from where they are read when the operator's own copy
is gone. Opened by the app where there is such a store; called by the dispatcher, the log routes and
retention.

A log is sent in the background. What has no mark is sent at the next start, so a crash in between loses
nothing. A day after it was sent, or read last, the copy here is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
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
_THREADS = 2 * _SENDERS  # as many are left to readers while the store of files hangs
_SOONEST_S, _LATEST_S = 1.0, 30.0
_LOOK_S = 3600


class Archive:
    """One operator's."""

    def __init__(
        self, files: ObjectStore, folders: JobFolders, store: Store, marks: Path, *, is_apart: bool
    ) -> None:
        """
        Args:
            marks: the folder `archived`.
            is_apart: whether other operators on the store may have data folders of their own.
        """
        self._copies = ArchivedFiles(files, folders, marks)
        self._store = store
        self._marks = marks
        self._is_apart = is_apart
        self._waiting: dict[str, None] = {}  # in order
        # Of earlier terms: the store may not know them any more. Where operators have folders of their
        # own, another may have driven them since, and what is here is the beginning alone.
        self._unsure: set[str] = set()
        self._sending: set[str] = set()
        # A log is sent, fetched, dropped or removed: a mark must not outlive what it stands for.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._more = asyncio.Event()
        self._pause_s = _SOONEST_S
        self._looked = float("-inf")
        self._limits: dict[str, int] = {}  # by version
        self._is_open = False
        # Its own: a server that hangs must not take the threads that all else runs in.
        self._threads = ThreadPoolExecutor(_THREADS, "archive")
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, dispatcher: Dispatcher) -> None:
        """Send logs, from now on: first what has not been sent so far. All unfinished jobs are in progress."""
        self._is_open = True
        for job_id in await self._run(self._copies.not_sent):
            if not dispatcher.in_progress(job_id) and job_id not in self._waiting:
                self._waiting[job_id] = None
                self._unsure.add(job_id)
        self._more.set()
        for number in range(_SENDERS):
            self._tasks.append(asyncio.create_task(self._send_all(), name=f"archive {number}"))

    async def close(self) -> None:
        """Send no more; what waits is left to whoever drives next."""
        self._is_open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._waiting.clear()
        self._sending.clear()
        self._unsure.clear()

    def end(self) -> None:
        """Nothing is read any more either."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def finished(self, job_id: str) -> None:
        """From the dispatcher: the log of this job grows no more."""
        self._waiting[job_id] = None
        self._more.set()

    async def has(self, job_id: str) -> bool:
        """Whether a finished job's log can be had without who drives: that one has no other folder, it is
        archived, or it is this operator."""
        if not self._is_apart or self._is_open:
            return True
        return await self._run((self._marks / job_id).exists)

    async def bring_back(self, record: JobRecord) -> None:
        """See to it that the log of a finished job is here, if it has one.

        Raises:
            NotFound: it is neither here nor there.
            NoDriver: whoever drives may not have sent it yet, and nobody does.
            StorageUnavailable: it cannot be had now.
        """
        job_id = record.spec.job_id
        async with self._turn(job_id):
            is_sure, is_leading = self._has_all_of(job_id), self._is_open
            is_here = await self._run(
                self._copies.bring_back, job_id, is_sure=is_sure, is_leading=is_leading
            )
        await self.drop_old()
        if not is_here and record.attempt:
            if self._is_apart and not self._is_open:
                raise NoLeader(
                    f"the log of the job {job_id} is not in the store of files yet, and no operator can be "
                    "asked that drives the jobs. Try again."
                )
            raise NotFound(
                f"the log of the job {record.spec.job_id} is gone: it is not in the store of files, to "
                "which it was not sent before the operator's machine was lost"
            )

    async def remove(self, job_ids: list[str]) -> None:
        """Remove the logs of these jobs, here and there.

        Raises:
            StorageUnavailable: some may be left.
        """
        async with AsyncExitStack() as stack:
            for job_id in job_ids:
                await stack.enter_async_context(self._turn(job_id))
                self._waiting.pop(job_id, None)
                self._sending.discard(job_id)
            await self._run(self._copies.remove, job_ids)

    async def drop_old(self) -> None:
        """Drop the copies here of what nobody has asked for in a while."""
        if time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            for job_id in await self._run(self._copies.old):
                async with self._turn(job_id):
                    await self._run(self._copies.drop, job_id)

    async def _send_all(self) -> None:
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            job_id = next(iter(self._waiting))
            del self._waiting[job_id]
            self._sending.add(job_id)
            async with self._turn(job_id):
                is_done = job_id not in self._sending or await self._send(job_id)
                self._sending.discard(job_id)
            if is_done:
                self._pause_s = _SOONEST_S
            else:
                await asyncio.sleep(self._pause_s)
                self._pause_s = min(2 * self._pause_s, _LATEST_S)

    async def _send(self, job_id: str) -> bool:
        """Whether there is nothing more to do for this log."""
        try:
            job = await self._store.job(job_id)
            if job is not None:  # what it does not know any more, retention was about to remove
                limit = await self._limit(job.spec.api_id)
                is_sure = self._has_all_of(job_id)
                await self._run(self._copies.send, job_id, limit, job.losses + 1, is_sure=is_sure)
            self._unsure.discard(job_id)
        except (StorageUnavailable, OSError) as error:
            log.warning("a log is still to be archived", job=job_id, error=str(error))
            self._waiting[job_id] = None  # behind the others: it may be this one alone
            return False
        except Exception as error:  # the others' logs have to be sent all the same
            log.error("a log cannot be archived", job=job_id, exc_info=error)
        return True

    async def _limit(self, api_id: str) -> int:
        """How much is kept of a log of this version."""
        if api_id not in self._limits:
            spec = await self._store.version(api_id)
            self._limits[api_id] = (spec.limits if spec is not None else Limits()).log
        return self._limits[api_id]

    def _has_all_of(self, job_id: str) -> bool:
        """Whether what is here of a log that was not sent from here is surely all of it."""
        return not self._is_apart or (self._is_open and job_id not in self._unsure)

    def _turn(self, job_id: str) -> asyncio.Lock:
        return self._turns.setdefault(job_id, asyncio.Lock())

    async def _run(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *arguments, **named))
