"""Keeps a job's log under its limit: punches what exceeds the limit out of the middle of the file.
The beginning and the end stay at their offsets: a reader's offset stays valid, and the writer
notices nothing. Called by the job's supervisor; `cortex.joblog.reader` reads `log.cut`.
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
FIRST_CHECK_S = 0.25
MIN_CHECK_INTERVAL_S = 0.05
MAX_CHECK_INTERVAL_S = 8.0
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_CUT = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
MAX_LINE_BYTES = 1 << 16
"""A cut is made at the end of a line; a longer line is cut where it is."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_CANNOT = b"cortex: the file system cannot punch holes into files; limits.log is not enforced\n"


def open_to_write(folder: int) -> int:
    """Open the log for a job, which appends to the lines of earlier attempts. Anything but a
    regular file, which an earlier attempt may have put there, is removed: following a link would
    write anywhere, and opening a pipe without a reader would block."""
    try:
        about = os.stat(NAME, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            os.unlink(NAME, dir_fd=folder)
    return os.open(NAME, _APPEND, 0o644, dir_fd=folder)


class Log:
    """Enforces the size limit of one log. The slower the log grows, the rarer the checks."""

    def __init__(self, folder: int, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._cut: LogCut | None = None
        self._size = 0
        self._interval_s = FIRST_CHECK_S
        self._last_check = time.monotonic()
        self.next_check = self._last_check + self._interval_s
        self._is_unable_to_cut = False

    def enforce_limit(self) -> None:
        """Cut the log if it exceeds its limit, and set `next_check` (monotonic clock)."""
        try:
            size = os.stat(NAME, dir_fd=self._folder, follow_symlinks=False).st_size
        except OSError:
            size = self._size
        if size - self._cut_bytes() > self._limit and not self._is_unable_to_cut:
            self._cut_file()
        self._schedule_check(size)

    def _cut_file(self) -> None:
        try:
            fd = os.open(NAME, _CUT, dir_fd=self._folder)
        except OSError:
            return
        try:
            self._cut_middle(fd, os.fstat(fd).st_size)
        except OSError:
            pass  # a full disk, most likely: the next check tries again
        finally:
            os.close(fd)

    def _schedule_check(self, size: int) -> None:
        now = time.monotonic()
        rate = (size - self._size) / max(now - self._last_check, 1e-6)
        room = max(0, self._limit - (size - self._cut_bytes()))
        half_full_s = room / rate / 2 if rate > 0 else MAX_CHECK_INTERVAL_S
        self._interval_s = max(
            MIN_CHECK_INTERVAL_S, min(self._interval_s * 2, half_full_s, MAX_CHECK_INTERVAL_S)
        )
        self._size, self._last_check, self.next_check = size, now, now + self._interval_s

    def _cut_bytes(self) -> int:
        return 0 if self._cut is None else self._cut.end - self._cut.start

    def _cut_middle(self, fd: int, size: int) -> None:
        # On either side of the hole: half of the limit is free until the next cut.
        kept_bytes = self._limit // 4
        start = _after_line(fd, kept_bytes) if self._cut is None else self._cut.start
        end = _after_line(fd, size - kept_bytes)
        cut = LogCut(start=start, end=end, limit=self._limit)
        # Before the hole is punched: a reader that finds zeros reads the record again.
        files.replace_durably(self._folder, CUT, cut.dumps())
        self._cut = cut
        if not punch(fd, start, end):
            os.unlink(CUT, dir_fd=self._folder)
            self._is_unable_to_cut = True
            self._cut = None
            os.pwrite(fd, _CANNOT, size)


def punch(fd: int, start: int, end: int) -> bool:
    """Punch a hole into a file: the part takes no space, and reads as zeros. False if the file
    system does not support that."""
    length = ctypes.c_long(end - start)
    return bool(libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(start), length) == 0)


def _after_line(fd: int, offset: int) -> int:
    """Where the next line begins; the offset itself, if that is too far off."""
    found = os.pread(fd, MAX_LINE_BYTES, offset).find(b"\n")
    return offset + found + 1
