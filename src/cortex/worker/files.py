"""Atomic files: a record appears complete or not at all.

Supervisors write their records with these functions, and engines fence attempts.

Names are relative to an open folder: records of a job still get into its folder if the folder is
moved meanwhile. The job can write in its folder, and may have put a link or a pipe in a record's
place: these functions do not follow the link, and do not wait for the pipe.
"""

from __future__ import annotations

import errno
import os
import stat
import time

_READ_BYTES = 1 << 16
_MAX_BYTES = 8 << 20  # several times the size of the largest record
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_folder(path: str) -> int:
    """Open a folder, to use its descriptor with the functions below."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def create(folder: int, name: str, data: bytes, *, made_in: int) -> bool:
    """Create a file with this content; False if the name is taken. O_EXCL alone would let a reader
    read half of the content.

    Args:
        made_in: a folder of the same file system for the temporary file. Only trusted users may
            write in it: a job could replace a temporary file in its own folder.
    """
    return link_once(folder, write_temporary(made_in, name, data), name, made_in=made_in)


def link_once(folder: int, temporary: str, name: str, *, made_in: int) -> bool:
    """Give a temporary file its name; False if the name is taken. Removes the temporary name."""
    try:
        # By default, Python follows a symbolic link.
        os.link(temporary, name, src_dir_fd=made_in, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary, dir_fd=made_in)
    return True


def replace_durably(folder: int, name: str, data: bytes) -> None:
    """Replace a file durably: it is complete even after a power failure."""
    rename(folder, write_temporary(folder, name, data, sync=True), name)


def sync(folder: int, name: str) -> None:
    """Write an existing file to the disk (fsync)."""
    fd = os.open(name, _READ, dir_fd=folder)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(folder: int, name: str, data: bytes) -> None:
    """Replace a file: it is complete for every reader, but a power failure may lose it."""
    rename(folder, write_temporary(folder, name, data), name)


def write_temporary(folder: int, name: str, data: bytes, *, sync: bool = False) -> str:
    """Write a temporary file, which is to get this name later; its temporary name."""
    made = temporary_name(name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(made, flags, 0o644, dir_fd=folder)
    try:
        write_all(fd, data)
        if sync:
            os.fsync(fd)
    except BaseException:
        os.unlink(made, dir_fd=folder)
        raise
    finally:
        os.close(fd)
    return made


def temporary_name(name: str) -> str:
    """A unique name for a file that is to get this name later."""
    return f".{name}.{os.getpid()}.{time.monotonic_ns()}"


def rename(folder: int, temporary: str, name: str) -> None:
    """Give a temporary file its name, and replace the file that has the name. Removes the temporary
    file if that fails."""
    try:
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(temporary, dir_fd=folder)
        raise


def read(folder: int, name: str) -> bytes | None:
    """The content of a record; None if there is none, and empty if it cannot be a record."""
    try:
        fd = os.open(name, _READ, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # ENXIO: a socket
            return None
        raise
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            return b""
        data = os.read(fd, min(about.st_size, _MAX_BYTES) + 1)
        while len(data) <= _MAX_BYTES and (piece := os.read(fd, _READ_BYTES)):
            data += piece
        return data if len(data) <= _MAX_BYTES else b""
    finally:
        os.close(fd)


def tail(folder: int, name: str, start: int, limit: int = 4096) -> bytes:
    """The last `limit` bytes of a file, but nothing from before `start`."""
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
    """Whether it is a regular file: no other file can be a record or a log."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def write_all(fd: int, data: bytes) -> None:
    """Write all bytes."""
    while data:
        data = data[os.write(fd, data) :]
