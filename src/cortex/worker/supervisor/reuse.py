"""Files that the jobs of one supervising process share or pass on: on some disks, each new inode
costs a millisecond. `station` owns them, and `watch` uses them.

- Each `start.<attempt>` is a hard link to one file, which holds the start record of the latest job.
- Each `exit.<attempt>` is a hard link to a journal with one line for each job that has ended.
- `files` and `job.json` are moved to the folder of the next job, unless a job has touched them.

A running job can spoil the files that have a name in its folder: its own start record, but no exit
record of another job. The journal gets a name in a job's folder only after the last process of that
job has ended.
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
"""Each read of an exit record, and each copy of a job's folder, reads the whole journal."""
MAX_LINE = 1 << 13


class Reuse:
    """The shared files of one supervising process."""

    __slots__ = ("_files", "_job", "_journal", "_start")

    def __init__(self) -> None:
        self._start = _SharedFile()
        self._journal = _SharedFile()
        # Their states as this process has left them in the folder of the last job.
        self._job: tuple[int, ...] | None = None
        self._files: tuple[tuple[int, ...], list[str]] | None = None

    @property
    def private_fds(self) -> tuple[int, ...]:
        """File descriptors that a job must not have."""
        return tuple(one.fd for one in (self._start, self._journal) if one.fd >= 0)

    def lay_out(self, folder: int, last: int | None, job: bytes) -> None:
        """Provide `files` and `job.json`.

        Args:
            last: the open folder of the last job, which has no process left.
            job: the content of `job.json`.

        Raises:
            OSError: the folder cannot be written.
        """
        self._lay_out_files(folder, last)
        self._lay_out_job_json(folder, last, job)

    def create_start(self, folder: int, name: str, data: bytes) -> bool:
        """Create a start record, which is complete before it has its name; False if the folder has
        that name already.

        Raises:
            OSError: the folder cannot be written.
        """
        start = self._start
        if start.is_intact():
            try:
                start.write_end(data)
                start.link(folder, name)
            except FileExistsError:
                return False
            except OSError:
                pass  # the cause may lie in the shared file: try again with a new one
            else:
                return True
        temporary = start.create(folder, name, data)
        return files.link_once(folder, temporary, name, made_in=folder)

    def write_exit_record(self, folder: int, name: str, data: bytes) -> None:
        """Write an exit record, which is complete before it has its name; a power failure may lose
        it. The job must have no process left, and no further attempt.

        Raises:
            OSError: the folder cannot be written.
        """
        line = b"\n" + data + b"\n"  # the line before may lack its newline
        if len(line) > MAX_LINE:
            files.replace(folder, name, data)
            return
        journal = self._journal
        if journal.is_intact() and journal.size + len(line) <= MAX_JOURNAL:
            try:
                journal.write_end(line, journal.size)
                journal.link(folder, name)
            except OSError:
                pass  # the cause may lie in the journal, or the job has made a file of that name
            else:
                return
        files.rename(folder, journal.create(folder, name, line), name)

    def _lay_out_files(self, folder: int, last: int | None) -> None:
        state, self._files = self._files, None
        if state is not None and last is not None and _is_untouched(last, state):
            try:
                os.rename(FILES, FILES, src_dir_fd=last, dst_dir_fd=folder)
            except OSError:
                pass  # retention removes the last job, or an earlier attempt has left files here
            else:
                self._files = _state(os.stat(FILES, dir_fd=folder)), state[1]
                return
        try:
            os.mkdir(FILES, dir_fd=folder)
        except FileExistsError:
            return
        self._files = _state_of_files(folder)

    def _lay_out_job_json(self, folder: int, last: int | None, data: bytes) -> None:
        size = 0 if last is None else self._move_job_json(last, folder)
        if size > 0:
            # After the move: if this process were killed in between, the folder of the last job
            # would otherwise have the config of this one.
            fd = os.open(JOB, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                files.write_all(fd, data)
                if len(data) < size:  # O_TRUNC would make ext4 write to the disk at once
                    os.ftruncate(fd, len(data))
            finally:
                os.close(fd)
        else:
            files.replace(folder, JOB, data)
        self._job = _state(os.stat(JOB, dir_fd=folder, follow_symlinks=False))

    def _move_job_json(self, last: int, folder: int) -> int:
        """Move `job.json` from the folder of the last job; its size, or 0 if it was not moved."""
        try:
            about = os.stat(JOB, dir_fd=last, follow_symlinks=False)
            if _state(about) != self._job:
                return 0
            os.rename(JOB, JOB, src_dir_fd=last, dst_dir_fd=folder)
        except OSError:
            return 0
        return about.st_size


class _SharedFile:
    """A file with a name in the folders of several jobs. It is kept open for reading only: a file
    that is open for writing prevents a remount of its file system as read-only."""

    __slots__ = ("_permissions", "fd", "size")

    def __init__(self) -> None:
        self.fd = -1
        self.size = 0
        self._permissions: tuple[int, ...] = ()

    def is_intact(self) -> bool:
        """Whether the file is as this process has left it, and can get one more name."""
        if self.fd < 0:
            return False
        about = os.fstat(self.fd)
        is_same = _permissions(about) == self._permissions and about.st_size == self.size
        return is_same and 0 < about.st_nlink < MAX_LINKS

    def write_end(self, data: bytes, offset: int = 0) -> None:
        """Replace the content from this offset on."""
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
        """Give the file one more name."""
        os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=folder)

    def create(self, folder: int, name: str, data: bytes) -> str:
        """Replace this file by a new one; the temporary name of the new one."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        temporary = files.write_temporary(folder, name, data)
        try:
            self.fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return temporary  # out of descriptors: the next job gets a new file again
        self.size, self._permissions = len(data), _permissions(os.fstat(self.fd))
        return temporary


def _permissions(about: os.stat_result) -> tuple[int, ...]:
    return about.st_mode, about.st_uid, about.st_gid


def _state(about: os.stat_result) -> tuple[int, ...]:
    """A value that changes with every change of a file, unless the change comes within the same
    kernel tick (some ms) as the one before."""
    same = about.st_dev, about.st_ino, about.st_nlink, about.st_ctime_ns
    return *same, *_permissions(about), about.st_size


def _state_of_files(folder: int) -> tuple[tuple[int, ...], list[str]]:
    about = os.stat(FILES, dir_fd=folder, follow_symlinks=False)
    try:
        attributes = os.listxattr(
            _path(folder, FILES), follow_symlinks=False
        )  # ACLs are among them
    except OSError:
        attributes = []  # the file system has none
    return _state(about), attributes


def _is_untouched(folder: int, state: tuple[tuple[int, ...], list[str]]) -> bool:
    try:
        return _state_of_files(folder) == state and not os.listdir(_path(folder, FILES))
    except OSError:
        return False


def _path(folder: int, name: str) -> str:
    return f"/proc/self/fd/{folder}/{name}"
