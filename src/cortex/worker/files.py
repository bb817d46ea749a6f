"""Records that appear complete or not at all. Called by supervisors, and by engines to fence.

Everything is relative to an open folder, so that a job whose folder is moved meanwhile still writes
its records into it. The folder is the job's, which may have put a link or a pipe in a record's place:
neither is followed or waited for.
"""

from __future__ import annotations

import errno
import os
import stat
import time

_READ_BYTES = 1 << 16
_MOST_BYTES = 8 << 20  # several times of what the largest record takes
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_folder(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def create(folder: int, name: str, data: bytes, *, made_in: int) -> bool:
    """Create a file with this content; False if there is one already. O_EXCL alone would let a
    reader see half of it.

    Args:
        made_in: a folder of the same file system in which nobody can put another file in place of the one that is
            about to get the name, as the job can in its own.
    """
    return name_once(folder, write(made_in, name, data), name, made_in=made_in)


def name_once(folder: int, temporary: str, name: str, *, made_in: int) -> bool:
    """Give a file its name, unless another one has it: then False. The temporary name goes in either case."""
    try:
        # Python would follow a link.
        os.link(temporary, name, src_dir_fd=made_in, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary, dir_fd=made_in)
    return True


def replace(folder: int, name: str, data: bytes) -> None:
    """Write a file anew, so that it is whole even after a loss of power."""
    rename(folder, write(folder, name, data, sync=True), name)


def sync(folder: int, name: str) -> None:
    """Put a file that is there onto the disk."""
    fd = os.open(name, _READ, dir_fd=folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put(folder: int, name: str, data: bytes) -> None:
    """Write a file anew, whole for every reader; a loss of power may take it."""
    rename(folder, write(folder, name, data), name)


def write(folder: int, name: str, data: bytes, *, sync: bool = False) -> str:
    """Write a new file that is about to get this name; its temporary name."""
    made = temporary(name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(made, flags, 0o644, dir_fd=folder)
    try:
        fill(fd, data)
        if sync:
            os.fsync(fd)
    except BaseException:
        os.unlink(made, dir_fd=folder)
        raise
    finally:
        os.close(fd)
    return made


def temporary(name: str) -> str:
    """A name for a file that is about to get this one."""
    return f".{name}.{os.getpid()}.{time.monotonic_ns()}"


def rename(folder: int, temporary: str, name: str) -> None:
    """Give a file its name, in place of what has it. A file that cannot get it is removed."""
    try:
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(temporary, dir_fd=folder)
        raise


def read(folder: int, name: str) -> bytes | None:
    """The content of a record, or None; nothing of what can be none."""
    try:
        fd = os.open(name, _READ, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # a socket is told by the last
            return None
        raise
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            return b""
        data = os.read(fd, min(about.st_size, _MOST_BYTES) + 1)
        while len(data) <= _MOST_BYTES and (piece := os.read(fd, _READ_BYTES)):
            data += piece
        return data if len(data) <= _MOST_BYTES else b""
    finally:
        os.close(fd)


def tail(folder: int, name: str, start: int, limit: int = 4096) -> bytes:
    """The end of a file, nothing from before `start`."""
    try:
        fd = os.open(name, _READ, dir_fd=folder)
    except OSError:
        return b""
    with open(fd, "rb") as file:
        if not is_regular(fd):
            return b""
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - limit))
        return file.read(limit)


def is_regular(fd: int) -> bool:
    """Whether it is a plain file, which alone a record or a log can be."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def fill(fd: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(fd, data) :]
