"""Records that appear complete or not at all. Called by supervisors, and by engines to fence.

Everything is relative to an open folder, so that a job whose folder is moved meanwhile still writes
its records into it.
"""

from __future__ import annotations

import os
import time


def open_folder(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def create(folder: int, name: str, data: bytes) -> bool:
    """Create a file with this content; False if there is one already. O_EXCL alone would let a
    reader see half of it."""
    temporary = _write(folder, name, data)
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary, dir_fd=folder)
    return True


def replace(folder: int, name: str, data: bytes) -> None:
    """Write a file anew, so that it is whole even after a loss of power."""
    temporary = _write(folder, name, data)
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    os.fsync(fd)
    os.close(fd)
    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)


def read(folder: int, name: str) -> bytes | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        return file.read()


def tail(folder: int, name: str, start: int, limit: int = 4096) -> bytes:
    """The end of a file, nothing from before `start`."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return b""
    with open(fd, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - limit))
        return file.read(limit)


def _write(folder: int, name: str, data: bytes) -> str:
    temporary = f".{name}.{os.getpid()}.{time.monotonic_ns()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o644, dir_fd=folder)
    try:
        with open(fd, "wb") as file:
            file.write(data)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise
    return temporary
