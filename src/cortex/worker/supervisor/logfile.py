"""Keeps a job's log under its limit: punches what exceeds the limit out of the middle of the file. The
beginning and the end stay at their offsets, so that a reader's offset stays valid and the writer
notices nothing. Called by the job's supervisor; `cortex.joblog.reader` reads the gap from `log.cut`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import time

from cortex.worker import files
from cortex.worker.messages import LogCut
from cortex.worker.processes import libc

NAME = "log"
CUT = "log.cut"
FIRST_S = 0.25
SOONEST_S = 0.05
LATEST_S = 8.0
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_CUT = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
MAX_LINE_BYTES = 1 << 16
"""A cut is made at the end of a line; a longer line is cut where it is."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_CANNOT = b"cortex: the file system cannot drop a part of a file, so limits.log is not kept\n"


def open_to_write(folder: int) -> int:
    """Open it for a job, which finds what an earlier attempt has written. What that has put in its place is
    removed: to follow a link is to write anywhere, and a pipe without a reader would be waited for."""
    try:
        about = os.stat(NAME, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            os.unlink(NAME, dir_fd=folder)
    return os.open(NAME, _APPEND, 0o644, dir_fd=folder)


class Log:
    """Looked at now and then: the more seldom, the slower it grows."""

    def __init__(self, folder: int, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._cut: LogCut | None = None
        self._size = 0
        self._pause_s = FIRST_S
        self._seen = time.monotonic()
        self.due = self._seen + self._pause_s
        self._gave_up = False

    def look(self) -> None:
        """Cut it if it is over its limit, and say in `due` when to look again."""
        try:
            size = os.stat(NAME, dir_fd=self._folder, follow_symlinks=False).st_size
        except OSError:
            size = self._size
        if size - self._gone() > self._limit and not self._gave_up:
            self._cut_open()
        self._plan(size)

    def _cut_open(self) -> None:
        try:
            fd = os.open(NAME, _CUT, dir_fd=self._folder)
        except OSError:
            return
        try:
            self._drop(fd, os.fstat(fd).st_size)
        except OSError:
            pass  # a full disk, most likely: there will be another look
        finally:
            os.close(fd)

    def _plan(self, size: int) -> None:
        now = time.monotonic()
        rate = (size - self._size) / max(now - self._seen, 1e-6)
        room = max(0, self._limit - (size - self._gone()))
        soon_s = room / rate / 2 if rate > 0 else LATEST_S
        self._pause_s = max(SOONEST_S, min(self._pause_s * 2, soon_s, LATEST_S))
        self._size, self._seen, self.due = size, now, now + self._pause_s

    def _gone(self) -> int:
        return 0 if self._cut is None else self._cut.end - self._cut.start

    def _drop(self, fd: int, size: int) -> None:
        # On either side: there is room for as much again until the next cut.
        keep = self._limit // 4
        start = _after_line(fd, keep) if self._cut is None else self._cut.start
        end = _after_line(fd, size - keep)
        cut = LogCut(start=start, end=end, limit=self._limit)
        # Told before it is done: a reader that finds zeros looks here again.
        files.replace(self._folder, CUT, cut.dumps())
        self._cut = cut
        if not punch(fd, start, end):
            os.unlink(CUT, dir_fd=self._folder)
            self._gave_up = True
            self._cut = None
            os.pwrite(fd, _CANNOT, size)


def punch(fd: int, start: int, end: int) -> bool:
    """Give back the room of a part of a file, which reads as zeros from then on; False where the file
    system cannot."""
    length = ctypes.c_long(end - start)
    return bool(libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(start), length) == 0)


def _after_line(fd: int, offset: int) -> int:
    """Where the next line begins; the offset itself, if that is too far off."""
    found = os.pread(fd, MAX_LINE_BYTES, offset).find(b"\n")
    return offset + found + 1
