"""Logs as files of the object store, and their copies in the data folder. Called by `archive`, in
threads.

<object store>/logs/<job_id>/log       the log without its gap
<object store>/logs/<job_id>/log.cut   the position of the gap in a log that exceeded its limit
<data folder>/archived/<job_id>        the mark, an empty file: the object store has that log
<data folder>/archived/.whole-<job_id> only until it is sent: the log here is complete, as the job
                                       ended while this operator was the leader
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cortex.joblog.folders import JobFolders
from cortex.joblog.reader import REPLACED, OpenLog, is_replaced, log_exists, opened
from cortex.objects import ObjectStore
from cortex.spec.times import new_id
from cortex.worker import beneath, checks, files
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile

_CHUNK_BYTES = 1 << 20
_MAX_UNUSED_S = 86_400
_PART = ".part-"
_WHOLE = ".whole-"


class ArchivedFiles:
    """The logs of one data folder and of the object store. All methods block, and raise
    StorageUnavailable or OSError when they fail. The caller serializes the calls for one job."""

    def __init__(self, store: ObjectStore, folders: JobFolders, marks: Path) -> None:
        """
        Args:
            marks: the folder `archived`.
        """
        self._store = store
        self._folders = folders
        self._marks = marks

    def not_sent(self) -> list[str]:
        """The jobs that have a folder here and no mark. Removes partial files that a killed
        operator left."""
        for part in self._marks.glob(f"{_PART}*"):
            # Another operator may be writing a new one, or have removed this one.
            with suppress(FileNotFoundError):
                if part.stat().st_mtime < time.time() - _MAX_UNUSED_S:
                    part.unlink()
        sent = {mark.name for mark in self._marks.iterdir()}
        return [job_id for job_id in self._folders.job_ids() if job_id not in sent]

    def note_whole(self, job_id: str) -> None:
        """Note that the log here is complete, also for the next start."""
        (self._marks / f"{_WHOLE}{job_id}").touch()

    def whole(self) -> set[str]:
        """The jobs whose logs here are complete for certain, and have not been sent."""
        return {note.name.removeprefix(_WHOLE) for note in self._marks.glob(f"{_WHOLE}*")}

    def forget_whole(self, job_id: str) -> None:
        """The log was sent, or its job is removed."""
        (self._marks / f"{_WHOLE}{job_id}").unlink(missing_ok=True)

    def send(self, job_id: str, limit: int, attempts: int, *, is_sure: bool) -> None:
        """Send a log, if the job has one, and no more of it than its limit allows.

        Args:
            limit: the `limits.log` of the API's version.
            attempts: the number of attempts that the job has had.
            is_sure: whether the log here is complete. If not, a log in the object store is fetched
                instead of replaced.
        """
        folder = self._folders.folder(job_id)
        if not folder.is_dir():
            return  # the job never wrote a line
        if not is_sure and self._fetch(job_id, folder):
            (self._marks / job_id).touch()
            return
        path = self._folders.log(job_id)
        with opened(path) as file:
            if file is None:
                self._store.put(_log(job_id), REPLACED.encode() if is_replaced(path) else b"")
            else:
                self._send_open(job_id, file, limit, attempts)
        (self._marks / job_id).touch()

    def _send_open(self, job_id: str, file: OpenLog, limit: int, attempts: int) -> None:
        size, gap = file.size(), file.gap(limit, attempts)
        if gap is None and size <= _CHUNK_BYTES:
            self._store.put(_log(job_id), os.pread(file.fd, size, 0))
            return
        start, end = (size, size) if gap is None else (gap.start, gap.end)
        with self._part() as part:
            with part.open("wb") as target, open(file.fd, "rb", closefd=False) as source:
                _copy(source, target, start)
                source.seek(end)
                _copy(source, target, size - end)  # the log may have changed since
            if gap is not None:
                self._store.put(_cut(job_id), gap.dumps())
            self._store.put(_log(job_id), part)

    def bring_back(self, job_id: str, *, is_sure: bool, is_leading: bool) -> bool:
        """Fetch a log, if the object store has it and the copy here may be incomplete. Returns
        whether a complete log is here now.

        Args:
            is_sure: whether a log here without a mark is complete.
            is_leading: the answer for a log here that may be incomplete, and that the object store
                does not have.
        """
        path, mark = self._folders.log(job_id), self._marks / job_id
        if not mark.exists() and path.parent.is_dir():
            if is_sure:
                return True
            if not self._fetch(job_id, path.parent):
                return is_leading  # from an earlier term: no other operator has led since
        elif (
            not log_exists(path) and not is_replaced(path) and not self._fetch(job_id, path.parent)
        ):
            return False
        mark.touch()
        return True

    def _fetch(self, job_id: str, folder: Path) -> bool:
        with self._part() as packed, self._part() as whole, self._part() as record:
            if not self._store.get(_log(job_id), packed):
                return False
            cut = self._store.read(_cut(job_id))
            if cut is not None and not _restore_gap(packed, whole, cut):
                cut = None
            folder.mkdir(0o700, exist_ok=True)
            fd = files.open_folder(str(folder))
            try:
                # Into the open folder, from a folder in which the job cannot replace the file.
                if cut is not None:
                    record.write_bytes(cut)
                    os.rename(record, logfile.CUT, dst_dir_fd=fd)
                part = packed if cut is None else whole
                with suppress(IsADirectoryError):  # the job's: readers say that it replaced its log
                    os.rename(part, logfile.NAME, dst_dir_fd=fd)
            finally:
                os.close(fd)
            return True

    def remove(self, job_ids: list[str]) -> None:
        """Remove logs and their marks from the object store. The caller removes the job folders."""
        self._store.delete([of(job_id) for job_id in job_ids for of in (_log, _cut)])
        for job_id in job_ids:
            (self._marks / job_id).unlink(missing_ok=True)
            self.forget_whole(job_id)

    def old(self) -> list[str]:
        """The jobs whose archived logs no client has read for a day."""
        marks = (mark for mark in self._marks.iterdir() if not mark.name.startswith("."))
        return [mark.name for mark in marks if _is_old(mark)]

    def drop(self, job_id: str) -> None:
        """Drop the copy here of an archived log, if no client has read it for a day."""
        mark = self._marks / job_id
        if _is_old(mark):
            path = str(self._folders.folder(job_id))
            with suppress(FileNotFoundError), beneath.opened(path) as folder:
                for name in (logfile.NAME, logfile.CUT):
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
            os.utime(mark, (0, 0))  # the copy is dropped

    @contextmanager
    def _part(self) -> Iterator[Path]:
        """A partial file, removed at the end, if it still exists: a failed transfer is retried."""
        part = self._marks / f"{_PART}{new_id()}"
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)


def _is_old(mark: Path) -> bool:
    try:
        return 0 < mark.stat().st_mtime < time.time() - _MAX_UNUSED_S
    except FileNotFoundError:
        return False


def _log(job_id: str) -> str:
    return f"logs/{job_id}/{logfile.NAME}"


def _cut(job_id: str) -> str:
    return f"logs/{job_id}/{logfile.CUT}"


def _restore_gap(packed: Path, whole: Path, cut: bytes) -> bool:
    """Write an archived log with its gap as a hole. False where the record of the gap cannot be
    true: an earlier version sent records unchecked."""
    size = packed.stat().st_size
    try:
        gap = LogCut.loads(cut)
        with packed.open("rb") as source, whole.open("wb") as target:
            _copy(source, target, gap.start)
            target.seek(gap.end)
            _copy(source, target, size - gap.start)
    except checks.Invalid:
        return False
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):  # beyond the largest file
            raise
        return False
    return gap.start <= size


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0 and (piece := source.read(min(size, _CHUNK_BYTES))):
        target.write(piece)
        size -= len(piece)
