"""The logs of finished jobs in the store of files, from where they are read when the operator's own copy
is gone. Opened by the app where there is such a store; called by the dispatcher, the log routes and
retention.

    <files>/logs/<job_id>/log          what is kept of it, without a gap
    <files>/logs/<job_id>/log.cut      where the gap of one that was over its limit is
    <data folder>/archived/<job_id>    empty: that log is in the store of files

A log is sent in the background. What has no mark is sent at the next start, so a crash in between loses
nothing. A day after it was sent, or read last, the copy here is dropped.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

import structlog

from cortex.engines.base import Engine
from cortex.errors import NoDriver, NotFound, StorageUnavailable
from cortex.operator.dispatcher import Dispatcher
from cortex.operator.logs import lost, opened
from cortex.projects.files import Files
from cortex.spec.job import JobRecord
from cortex.spec.times import new_id
from cortex.store import Store
from cortex.worker import files as records
from cortex.worker import logfile
from cortex.worker.messages import LogCut

T = TypeVar("T")

log = structlog.get_logger()

_SENDERS = 4
_THREADS = 2 * _SENDERS  # as many are left to readers while the store of files hangs
_SOONEST_S, _LATEST_S = 1.0, 30.0
_SMALL = 1 << 20
_KEPT_S = 86_400
_LOOK_S = 3600
_PART = ".part-"


class Archive:
    """One operator's."""

    def __init__(
        self, files: Files, engine: Engine, store: Store, marks: Path, *, is_apart: bool
    ) -> None:
        """
        Args:
            marks: the folder `archived`.
            is_apart: whether other operators on the store may have data folders of their own.
        """
        self._files = files
        self._engine = engine
        self._store = store
        self._marks = marks
        self._is_apart = is_apart
        self._waiting: dict[str, None] = {}  # in order
        # Of earlier terms: the store may not know them any more. Where operators have folders of their
        # own, another may have driven them since, and what is here is the beginning alone.
        self._unsure: set[str] = set()
        self._sending: dict[str, asyncio.Event] = {}
        self._more = asyncio.Event()
        self._pause_s = _SOONEST_S
        self._looked = float("-inf")
        self._is_open = False
        # Its own: a server that hangs must not take the threads that all else runs in.
        self._threads = ThreadPoolExecutor(_THREADS, "archive")
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, dispatcher: Dispatcher) -> None:
        """Send logs, from now on: first what has not been sent so far. All unfinished jobs are in progress."""
        self._is_open = True
        for job_id in await self._run(self._not_sent):
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
        is_sure = not self._is_apart or (self._is_open and job_id not in self._unsure)
        is_here = await self._run(self._bring_back, job_id, is_sure)
        await self.drop_old()
        if not is_here and record.attempt:
            if self._is_apart and not self._is_open:
                raise NoDriver(
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
        for job_id in job_ids:
            if (sent := self._sending.get(job_id)) is not None:
                await sent.wait()
            self._waiting.pop(job_id, None)  # also if that came to nothing
        await self._run(self._remove, job_ids)

    async def drop_old(self) -> None:
        """Drop the copies here of what nobody has asked for in a while."""
        if time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            await self._run(self._drop_old)

    async def _send_all(self) -> None:
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            job_id = next(iter(self._waiting))
            del self._waiting[job_id]
            done = self._sending[job_id] = asyncio.Event()
            try:
                await self._send(job_id)
            finally:
                self._sending.pop(job_id, None)
                done.set()

    async def _send(self, job_id: str) -> None:
        try:
            # What it does not know any more, retention was about to remove.
            if job_id not in self._unsure or await self._store.job(job_id) is not None:
                is_sure = not self._is_apart or job_id not in self._unsure
                await self._run(self._send_log, job_id, is_sure)
            self._unsure.discard(job_id)
            self._pause_s = _SOONEST_S
        except (StorageUnavailable, OSError) as error:
            log.warning("a log is still to be archived", job=job_id, error=str(error))
            self._waiting[job_id] = None  # behind the others: it may be this one alone
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LATEST_S)
        except Exception as error:  # the others' logs have to be sent all the same
            log.error("a log cannot be archived", job=job_id, exc_info=error)

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    # In threads

    def _not_sent(self) -> list[str]:
        for part in self._marks.glob(f"{_PART}*"):  # another operator may be writing a new one
            if part.stat().st_mtime < time.time() - _KEPT_S:
                part.unlink(missing_ok=True)
        sent = {mark.name for mark in self._marks.iterdir()}
        here = {folder.name for folder in self._engine.log("any").parents[1].iterdir()}
        return sorted(name for name in here - sent if not name.startswith("."))

    def _send_log(self, job_id: str, is_sure: bool) -> None:
        path = self._engine.log(job_id)
        if not path.parent.is_dir():
            return  # it never had anything to say
        if not is_sure and self._fetch(job_id, path.parent):
            (self._marks / job_id).touch()
            return
        gone = lost(path)
        with opened(path) as fd:
            if fd is None:
                self._files.put(_log(job_id), b"")
            elif gone is not None:
                part = self._part()
                with part.open("wb") as target, open(fd, "rb", closefd=False) as source:
                    _copy(source, target, gone.start)
                    source.seek(gone.end)
                    shutil.copyfileobj(source, target)
                self._files.put(_cut(job_id), gone.dumps())
                self._files.put(_log(job_id), part)
                part.unlink()
            elif (size := os.fstat(fd).st_size) <= _SMALL:
                self._files.put(_log(job_id), os.pread(fd, size, 0))
            else:
                # Not by its name, in whose place the job may have put another file.
                self._files.put(_log(job_id), Path(f"/proc/self/fd/{fd}"))
        (self._marks / job_id).touch()

    def _bring_back(self, job_id: str, is_sure: bool) -> bool:
        path, mark = self._engine.log(job_id), self._marks / job_id
        if not mark.exists() and path.parent.is_dir():
            if is_sure:
                return True  # all that there is of it is here
            if not self._fetch(job_id, path.parent):
                return self._is_open  # of an earlier term, and nobody has had it since
        elif not path.exists() and not self._fetch(job_id, path.parent):
            return False
        mark.touch()
        return True

    def _fetch(self, job_id: str, folder: Path) -> bool:
        part = self._part()
        if not self._files.get(_log(job_id), part):
            return False
        cut = self._files.read(_cut(job_id))
        if cut is not None:
            gone, packed = LogCut.loads(cut), part
            part = self._part()
            with packed.open("rb") as source, part.open("wb") as target:
                _copy(source, target, gone.start)
                target.seek(gone.end)
                shutil.copyfileobj(source, target)
            packed.unlink()
        folder.mkdir(0o700, exist_ok=True)
        fd = records.open_folder(str(folder))
        try:
            if cut is not None:
                records.put(fd, logfile.CUT, cut)
            os.rename(part, logfile.NAME, dst_dir_fd=fd)  # into the open folder
        finally:
            os.close(fd)
        return True

    def _remove(self, job_ids: list[str]) -> None:
        self._files.delete([of(job_id) for job_id in job_ids for of in (_log, _cut)])
        for job_id in job_ids:
            (self._marks / job_id).unlink(missing_ok=True)

    def _drop_old(self) -> None:
        before = time.time() - _KEPT_S
        with os.scandir(self._marks) as marks:
            old = [mark.name for mark in marks if 0 < mark.stat().st_mtime < before]
        for job_id in old:
            path = self._engine.log(job_id)
            for each in (path, path.with_name(logfile.CUT)):
                with suppress(FileNotFoundError):
                    each.unlink()
            os.utime(self._marks / job_id, (0, 0))  # there is nothing more to drop

    def _part(self) -> Path:
        return self._marks / f"{_PART}{new_id()}"


def _log(job_id: str) -> str:
    return f"logs/{job_id}/{logfile.NAME}"


def _cut(job_id: str) -> str:
    return f"logs/{job_id}/{logfile.CUT}"


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size and (piece := source.read(min(size, _SMALL))):
        target.write(piece)
        size -= len(piece)
