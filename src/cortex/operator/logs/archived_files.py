"""The files of logs in the store of files, and of the copies here. Called by `archive`, in threads.

<files>/logs/<job_id>/log          what is kept of it, without a gap
<files>/logs/<job_id>/log.cut      where the gap of one that was over its limit is
<data folder>/archived/<job_id>    empty: that log is in the store of files
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cortex.objects import ObjectStore
from cortex.operator.logs.follow import REPLACED, Log, is_replaced, is_there, lost, opened
from cortex.spec.times import new_id
from cortex.worker import beneath, checks
from cortex.worker import files as records
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile

_SMALL = 1 << 20
_KEPT_S = 86_400
_PART = ".part-"


class ArchivedFiles:
    """Of one data folder. What is about one job is done by one caller at a time. All of it blocks, and
    raises StorageUnavailable or OSError where it comes to nothing."""

    def __init__(self, files: ObjectStore, path: Callable[[str], Path], marks: Path) -> None:
        """
        Args:
            path: where the log of a job is.
            marks: the folder `archived`.
        """
        self._files = files
        self._path = path
        self._marks = marks

    def not_sent(self) -> list[str]:
        """The jobs that have a folder here and no mark; what an operator died over is removed."""
        for part in self._marks.glob(f"{_PART}*"):
            # Another operator may be writing a new one, or have removed it.
            with suppress(FileNotFoundError):
                if part.stat().st_mtime < time.time() - _KEPT_S:
                    part.unlink()
        sent = {mark.name for mark in self._marks.iterdir()}
        here = {folder.name for folder in self._path("any").parents[1].iterdir()}
        return sorted(name for name in here - sent if not name.startswith("."))

    def send(self, job_id: str, limit: int, attempts: int, *, is_sure: bool) -> None:
        """Send a log, if there is one, and no more of it than its limit allows; where it is not sure that all of it is
        here, only if none is there.

        Args:
            limit: the `limits.log` of the API's version.
            attempts: that the job has had.
        """
        path = self._path(job_id)
        if not path.parent.is_dir():
            return  # it never had anything to say
        if not is_sure and self._fetch(job_id, path.parent):
            (self._marks / job_id).touch()
            return
        with opened(path) as fd:
            size = 0 if fd is None else os.fstat(fd).st_size
            gone = None if fd is None else lost(Log(path, limit, attempts), fd)
            if fd is None:
                self._files.put(_log(job_id), REPLACED.encode() if is_replaced(path) else b"")
            elif gone is None and size <= _SMALL:
                self._files.put(_log(job_id), os.pread(fd, size, 0))
            else:
                start, end = (size, size) if gone is None else (gone.start, gone.end)
                with self._part() as part:
                    with part.open("wb") as target, open(fd, "rb", closefd=False) as source:
                        _copy(source, target, start)
                        source.seek(end)
                        _copy(source, target, size - end)  # whatever it has become since
                    if gone is not None:
                        self._files.put(_cut(job_id), gone.dumps())
                    self._files.put(_log(job_id), part)
        (self._marks / job_id).touch()

    def bring_back(self, job_id: str, *, is_sure: bool, is_driving: bool) -> bool:
        """Whether a log is here now, with all that there is of it.

        Args:
            is_sure: whether what is here without a mark is all.
            is_driving: whether it is, where the store of files has none.
        """
        path, mark = self._path(job_id), self._marks / job_id
        if not mark.exists() and path.parent.is_dir():
            if is_sure:
                return True  # all that there is of it is here
            if not self._fetch(job_id, path.parent):
                return is_driving  # of an earlier term, and nobody has had it since
        elif not is_there(path) and not is_replaced(path) and not self._fetch(job_id, path.parent):
            return False
        mark.touch()
        return True

    def _fetch(self, job_id: str, folder: Path) -> bool:
        with self._part() as packed, self._part() as whole, self._part() as told:
            if not self._files.get(_log(job_id), packed):
                return False
            cut = self._files.read(_cut(job_id))
            if cut is not None and not _unpack(packed, whole, cut):
                cut = None
            folder.mkdir(0o700, exist_ok=True)
            fd = records.open_folder(str(folder))
            try:
                # Into the open folder, from one in which the job cannot put another file in place of it.
                if cut is not None:
                    told.write_bytes(cut)
                    os.rename(told, logfile.CUT, dst_dir_fd=fd)
                part = packed if cut is None else whole
                with suppress(IsADirectoryError):  # the job's, which is shown to be in its place
                    os.rename(part, logfile.NAME, dst_dir_fd=fd)
            finally:
                os.close(fd)
            return True

    def remove(self, job_ids: list[str]) -> None:
        """Remove logs from the store of files, and their marks; what is here is others' to remove."""
        self._files.delete([of(job_id) for job_id in job_ids for of in (_log, _cut)])
        for job_id in job_ids:
            (self._marks / job_id).unlink(missing_ok=True)

    def old(self) -> list[str]:
        """The jobs whose logs nobody has asked for in a day."""
        return [mark.name for mark in self._marks.iterdir() if _is_old(mark)]

    def drop(self, job_id: str) -> None:
        """Drop the log here of such a job, if it still is one."""
        mark, path = self._marks / job_id, self._path(job_id)
        if _is_old(mark):
            with suppress(FileNotFoundError), beneath.opened(str(path.parent)) as folder:
                for name in (logfile.NAME, logfile.CUT):
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
            os.utime(mark, (0, 0))  # there is nothing more to drop

    @contextmanager
    def _part(self) -> Iterator[Path]:
        """A file of which nothing is left where it came to nothing: it is tried again and again."""
        part = self._marks / f"{_PART}{new_id()}"
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)


def _is_old(mark: Path) -> bool:
    try:
        return 0 < mark.stat().st_mtime < time.time() - _KEPT_S
    except FileNotFoundError:
        return False


def _log(job_id: str) -> str:
    return f"logs/{job_id}/{logfile.NAME}"


def _cut(job_id: str) -> str:
    return f"logs/{job_id}/{logfile.CUT}"


def _unpack(packed: Path, whole: Path, cut: bytes) -> bool:
    """Give a log its gap; False where the record of that cannot be true, which an earlier version did not look at."""
    size = packed.stat().st_size
    try:
        gone = LogCut.loads(cut)
        with packed.open("rb") as source, whole.open("wb") as target:
            _copy(source, target, gone.start)
            target.seek(gone.end)
            _copy(source, target, size - gone.start)
    except checks.Invalid:
        return False
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):  # no file gets as long
            raise
        return False
    return gone.start <= size


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0 and (piece := source.read(min(size, _SMALL))):
        target.write(piece)
        size -= len(piece)
