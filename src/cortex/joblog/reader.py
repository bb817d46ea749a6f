"""Reads a job's log, which may have lost its middle: the job's supervisor punches a hole into a log
that exceeds `limits.log`, and records the hole in `log.cut` (`cortex.worker.supervisor.logfile`).

The job can write to its folder. It can put a link, a pipe or another file in place of its log,
write the record of a gap itself, and make the log as large as a file can be. Therefore nothing but
a plain file of the job's alone is read, and no more of a log than its limit allows.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cortex.worker import beneath, checks, files
from cortex.worker.messages import LogCut
from cortex.worker.messages import size as readable
from cortex.worker.supervisor import logfile

REMOVED = "[cortex: the log was removed while it was read]\n"
REPLACED = "[cortex: the log is not shown, for the job has put something else in its place]\n"

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# No such file, a link, a socket, a file without read permission or with a lease (fcntl(2)).
_NOT_READABLE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EAGAIN)
_MAX_RECORD_BYTES = 4096
# A supervisor cuts at the ends of lines, on either side of the gap.
_SLACK_BYTES = 2 * logfile.MAX_LINE_BYTES


@dataclass(frozen=True)
class Log:
    """A job's log, and how much of it may be read, whatever the file contains."""

    path: Path
    limit: int
    """The `limits.log` of the API's version."""
    attempts: int = 1
    """The number of attempts that have written the log; each may have filled it."""


@dataclass(frozen=True)
class Part:
    """Bytes of a log. They end where the gap begins, and there are none from within the gap."""

    offset: int
    data: bytes
    gap: LogCut | None
    """The gap of the log, wherever it is."""

    @property
    def end(self) -> int:
        """The offset after the bytes."""
        return self.offset + len(self.data)

    @property
    def is_in_gap(self) -> bool:
        """Whether the offset lies within the gap."""
        return self.gap is not None and self.gap.start <= self.offset < self.gap.end


@dataclass(frozen=True)
class Piece:
    """Bytes of a log as users see it: one line stands for the gap."""

    data: bytes
    end: int
    """The offset after these bytes; after the gap, if they stand for it."""
    is_marker: bool = False
    """Whether these bytes stand for the gap."""


class OpenLog:
    """A job's log, open for reading with its folder: the job may rename either meanwhile."""

    def __init__(self, folder: int, fd: int) -> None:
        self.fd = fd
        self._folder = folder

    def close(self) -> None:
        """Close the log. Call it once."""
        os.close(self.fd)
        os.close(self._folder)

    def size(self) -> int:
        """The bytes that the log has had so far, the gap included."""
        return os.fstat(self.fd).st_size

    def gap(self, limit: int, attempts: int = 1) -> LogCut | None:
        """The gap of the log, if it has one; see `find_gap`."""
        record = b""
        fd = _open_own(self._folder, logfile.CUT)
        if fd is not None:
            try:
                record = os.pread(fd, _MAX_RECORD_BYTES, 0)
            finally:
                os.close(fd)
        return find_gap(record, self.size(), limit, attempts)

    def part(self, offset: int, size: int, limit: int, attempts: int = 1) -> Part:
        """Up to `size` bytes from an offset on."""
        # The kernel refuses a read that extends beyond the largest offset of a file (EINVAL).
        data = os.pread(self.fd, max(0, min(size, self.size() - offset)), offset)
        # After the read: bytes that the supervisor punches out meanwhile read as zeros.
        gap = self.gap(limit, attempts)
        if gap is not None and offset < gap.end:
            data = data[: max(0, gap.start - offset)]
        return Part(offset, data, gap)


def open_log(path: Path) -> OpenLog | None:
    """Open a log. None where no log exists yet, and where the job has put something else in its
    place: a link would lead to files that only the operator may read.

    Raises:
        OSError: folder or log cannot be opened now.
    """
    try:
        folder = files.open_folder(str(path.parent))
    except FileNotFoundError:
        return None
    fd = None
    try:
        fd = _open_own(folder, path.name)
    finally:
        if fd is None:
            os.close(folder)
    return None if fd is None else OpenLog(folder, fd)


@contextmanager
def opened(path: Path) -> Iterator[OpenLog | None]:
    """`open_log`, closed at the end."""
    file = open_log(path)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def read(log: Log, offset: int, size: int) -> Piece:
    """Up to `size` bytes of a log from an offset on, or the line that stands for the gap, if the
    offset lies within it. No bytes where no log exists yet."""
    with opened(log.path) as file:
        if file is None:
            return Piece(b"", offset)
        part = file.part(offset, size, log.limit, log.attempts)
    if part.gap is not None and part.is_in_gap:
        return Piece(_marker(part.gap), part.gap.end, is_marker=True)
    return Piece(part.data, part.end)


def log_exists(path: Path) -> bool:
    """Whether a log exists."""
    with opened(path) as file:
        return file is not None


def is_replaced(path: Path) -> bool:
    """Whether the job has put something in place of its log that is not a log."""
    with suppress(FileNotFoundError), beneath.opened(str(path.parent)) as folder:
        return beneath.stat(folder, path.name) is not None and not log_exists(path)
    return False


def length(path: Path) -> int:
    """The bytes that a log has had so far, the gap included; 0 where no log exists."""
    with opened(path) as file:
        return 0 if file is None else file.size()


def find_gap(record: bytes | None, size: int, limit: int, attempts: int = 1) -> LogCut | None:
    """The gap of a log: the recorded one, if it can be true, extended to all that exceeds the
    limit. A job can write both files, and a sparse file of the largest size takes no disk space.

    Args:
        record: the content of `log.cut`, read before `size` was determined.
        size: the size of the log's file.
        attempts: the number of attempts that have written the log; each may have filled it.
    """
    try:
        cut = LogCut.loads(record) if record else None
    except checks.Invalid:
        cut = None
    if cut is not None and cut.end > size:
        cut = None
    max_bytes = limit * attempts + _SLACK_BYTES
    if size - (0 if cut is None else cut.end - cut.start) > max_bytes:
        start, end = max_bytes // 2, size - max_bytes // 2
        if cut is not None:
            start, end = min(cut.start, start), max(cut.end, end)
        return LogCut(start=start, end=end, limit=limit)
    return cut and LogCut(start=cut.start, end=cut.end, limit=limit)


def is_own(folder: int, fd: int) -> bool:
    """Whether an open file is a plain file that only the job or the operator can have created. A
    job can move or link a file into its folder that the operator may read and the job may not. Of
    the operator's own files the job may read those that all users may read.

    Args:
        folder: the job's folder, open.
    """
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        return False
    is_public = bool(about.st_mode & stat.S_IROTH) and about.st_uid == os.geteuid()
    return is_public or about.st_uid == os.fstat(folder).st_uid


def _open_own(folder: int, name: str) -> int | None:
    """Open a file of a job's folder, if it is the job's own."""
    try:
        fd = os.open(name, _READ, dir_fd=folder)
    except OSError as error:
        if error.errno not in _NOT_READABLE:
            raise
        return None
    if is_own(folder, fd):
        return fd
    os.close(fd)
    return None


def _marker(gap: LogCut) -> bytes:
    amount = readable(gap.end - gap.start)
    return f"[cortex: {amount} of the log are gone: limits.log is {readable(gap.limit)}]\n".encode()
