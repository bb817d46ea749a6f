"""The files that the jobs of one supervising process share or pass on: on some disks each new inode costs a
millisecond. `bench` owns them, and `supervisor` uses them.

- Each `start.<attempt>` is a hard link to one file, which holds the start record of the latest job.
- Each `exit.<attempt>` is a hard link to a journal with one line for each job that has ended.
- `files` and `job.json` move on to the folder of the next job, unless a job has touched them.

A running job can spoil what has a name in its own folder: its own start record, and no exit record of another
job. The journal gets a name in a job's folder only after the last process of that job.
"""

from __future__ import annotations

import errno
import os

from cortex.worker import files

FILES = "files"
JOB = "job.json"
MAX_LINKS = 1000
"""File systems limit the names of an inode: NTFS to 1,024, ext4 to 65,000."""
MAX_JOURNAL = 1 << 15
"""Whoever reads an exit record or copies a job's folder reads the whole journal."""
MAX_LINE = 1 << 13


class Reuse:
    """All of one supervising process."""

    __slots__ = ("_files", "_job", "_journal", "_start")

    def __init__(self) -> None:
        self._start = _Shared()
        self._journal = _Shared()
        # As this process has left them in the folder of the last job.
        self._job: tuple[int, ...] | None = None
        self._files: tuple[tuple[int, ...], list[str]] | None = None

    @property
    def open_files(self) -> tuple[int, ...]:
        """File descriptors that a job must not have."""
        return tuple(one.fd for one in (self._start, self._journal) if one.fd >= 0)

    def lay_out(self, folder: int, last: int | None, job: bytes) -> None:
        """Provide `files` and `job.json`.

        Args:
            last: the folder of the last job, which has no process left.
            job: the content of `job.json`.

        Raises:
            OSError: the folder cannot be written.
        """
        self._lay_out_files(folder, last)
        self._lay_out_job(folder, last, job)

    def create_start(self, folder: int, name: str, data: bytes) -> bool:
        """Create a start record, complete before it has its name; False if the folder has that name already.

        Raises:
            OSError: the folder cannot be written.
        """
        start = self._start
        if start.is_intact():
            try:
                start.write(data)
                start.link(folder, name)
            except FileExistsError:
                return False
            except OSError:
                pass  # the reason may lie in the shared file: a new one has it no more
            else:
                return True
        made = start.make(folder, name, data)
        return files.name_once(folder, made, name, made_in=folder)

    def put_exit(self, folder: int, name: str, data: bytes) -> None:
        """Write an exit record, complete before it has its name; a loss of power may take it. The job must
        have no process left, and no further attempt.

        Raises:
            OSError: the folder cannot be written.
        """
        line = b"\n" + data + b"\n"  # however the line before ends
        if len(line) > MAX_LINE:
            files.put(folder, name, data)
            return
        journal = self._journal
        if journal.is_intact() and journal.size + len(line) <= MAX_JOURNAL:
            try:
                journal.write(line, journal.size)
                journal.link(folder, name)
            except OSError:
                pass  # the reason may lie in the journal, or the job has made a file of that name
            else:
                return
        files.rename(folder, journal.make(folder, name, line), name)

    def _lay_out_files(self, folder: int, last: int | None) -> None:
        left, self._files = self._files, None
        if left is not None and last is not None and _is_unused(last, left):
            try:
                os.rename(FILES, FILES, src_dir_fd=last, dst_dir_fd=folder)
            except OSError:
                pass  # retention removes the last job now, or an earlier attempt has left files
            else:
                self._files = _state(os.stat(FILES, dir_fd=folder)), left[1]
                return
        try:
            os.mkdir(FILES, dir_fd=folder)
        except FileExistsError:
            return
        self._files = _state_of_files(folder)

    def _lay_out_job(self, folder: int, last: int | None, data: bytes) -> None:
        size = 0 if last is None else self._moved_job(last, folder)
        if size > 0:
            # Never before the move: after a kill the other job's folder would have this job's config.
            fd = os.open(JOB, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                files.fill(fd, data)
                if len(data) < size:  # O_TRUNC would let ext4 write to the disk at once
                    os.ftruncate(fd, len(data))
            finally:
                os.close(fd)
        else:
            files.put(folder, JOB, data)
        self._job = _state(os.stat(JOB, dir_fd=folder, follow_symlinks=False))

    def _moved_job(self, last: int, folder: int) -> int:
        """The size of a `job.json` that has moved on from the folder of the last job; 0 if none has."""
        try:
            about = os.stat(JOB, dir_fd=last, follow_symlinks=False)
            if _state(about) != self._job:
                return 0
            os.rename(JOB, JOB, src_dir_fd=last, dst_dir_fd=folder)
        except OSError:
            return 0
        return about.st_size


class _Shared:
    """A file of which jobs have had names. It is open for reading alone: a file that is open for writing keeps
    its file system from being made read-only."""

    __slots__ = ("_rights", "fd", "size")

    def __init__(self) -> None:
        self.fd = -1
        self.size = 0
        self._rights: tuple[int, ...] = ()

    def is_intact(self) -> bool:
        """Whether it is there, as this process has left it, and can have one more name."""
        if self.fd < 0:
            return False
        about = os.fstat(self.fd)
        is_same = _rights(about) == self._rights and about.st_size == self.size
        return is_same and 0 < about.st_nlink < MAX_LINKS

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write this as its end."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.pwrite(fd, data, offset) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            end = offset + len(data)
            if end < self.size:
                os.ftruncate(fd, end)
        finally:
            os.close(fd)
        self.size = end

    def link(self, folder: int, name: str) -> None:
        """Give it one more name."""
        os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=folder)

    def make(self, folder: int, name: str, data: bytes) -> str:
        """Begin with a new file; its temporary name."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        temporary = files.write(folder, name, data)
        try:
            self.fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return temporary  # for want of descriptors: the next job has a new one again
        self.size, self._rights = len(data), _rights(os.fstat(self.fd))
        return temporary


def _rights(about: os.stat_result) -> tuple[int, ...]:
    return about.st_mode, about.st_uid, about.st_gid


def _state(about: os.stat_result) -> tuple[int, ...]:
    """Any change of a file changes this, but for one within the kernel's tick (some ms) of the last."""
    same = about.st_dev, about.st_ino, about.st_nlink, about.st_ctime_ns
    return *same, *_rights(about), about.st_size


def _state_of_files(folder: int) -> tuple[tuple[int, ...], list[str]]:
    about = os.stat(FILES, dir_fd=folder, follow_symlinks=False)
    try:
        attributes = os.listxattr(_path(folder, FILES), follow_symlinks=False)  # access lists, too
    except OSError:
        attributes = []  # the file system has none
    return _state(about), attributes


def _is_unused(folder: int, left: tuple[tuple[int, ...], list[str]]) -> bool:
    try:
        return _state_of_files(folder) == left and not os.listdir(_path(folder, FILES))
    except OSError:
        return False


def _path(folder: int, name: str) -> str:
    return f"/proc/self/fd/{folder}/{name}"
