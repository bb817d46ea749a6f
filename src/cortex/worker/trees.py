"""Reads and removes folders that jobs have written in. There, a path may be too deep to open, and a
folder's mode may lock out its owner. Used by the workspace backends, and to remove job folders and
environments.
"""

from __future__ import annotations

import os
import stat
import time

from cortex.worker import beneath

BYTE_CODE = "__pycache__"
OWN_CHANGES = "own"
"""Subfolder of a job's folder, for what the job has made or changed in its workspace."""
_MAX_DEPTH = 50


def snapshot(root: str) -> dict[str, tuple[int, ...]]:
    """All files and folders below a folder, except byte code: their relative paths, and values that
    change when the file does."""
    found: dict[str, tuple[int, ...]] = {}
    folders = [""]
    for folder in folders:  # the loop extends it
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    if not entry.is_dir(follow_symlinks=False):
                        about = entry.stat(follow_symlinks=False)
                        found[path] = about.st_ino, about.st_size, about.st_mtime_ns, about.st_mode
                    elif entry.name != BYTE_CODE:
                        found[path] = ()
                        folders.append(path)
        except OSError:
            continue  # not readable for this user
    return found


def remove(path: str) -> None:
    """Remove a file or folder, as far as possible.

    Args:
        path: no folder above it may be writable for users who have fewer rights than this one.
    """
    above, name = os.path.split(path)
    try:
        with beneath.opened(above) as folder:
            remove_from(folder, name)
    except OSError:
        return


def remove_from(folder: int, name: str) -> None:
    """Remove a file or folder from an open folder, as far as possible. Touches nothing outside that
    folder, whatever other processes move or link meanwhile."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        pass
    except OSError:
        return
    else:
        return
    moved: list[str] = []
    try:
        top = _open_subfolder(folder, name)
        try:
            _empty(top, top, 0, moved)
            for each in moved:  # the loop extends it
                _remove_folder(top, each, top, 1, moved)
        finally:
            os.close(top)
        os.rmdir(name, dir_fd=folder)
    except OSError:
        return


def clear_own_changes(folder: int, aside: str) -> None:
    """Remove `OWN_CHANGES` from a job's folder: the changes of an earlier attempt, or anything that
    the job has put there.

    Args:
        aside: an unused path on the same file system, to which it is moved first.
    """
    remove(aside)
    try:
        os.rename(OWN_CHANGES, aside, src_dir_fd=folder)
    except FileNotFoundError:
        return
    remove(aside)


def _empty(folder: int, top: int, level: int, moved: list[str]) -> None:
    """Empty an open folder. Each level takes a descriptor; therefore folders below `_MAX_DEPTH` are
    moved to the top, and their names there are added to `moved`."""
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        try:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=folder)
            elif level < _MAX_DEPTH:
                _remove_folder(folder, entry.name, top, level + 1, moved)
            else:
                _grant_owner_rights(
                    folder, entry.name
                )  # moving a folder changes its `..`: that takes write permission
                name = f".removed-{time.monotonic_ns()}"
                os.rename(entry.name, name, src_dir_fd=folder, dst_dir_fd=top)
                moved.append(name)
        except OSError:
            continue


def _remove_folder(above: int, name: str, top: int, level: int, moved: list[str]) -> None:
    try:
        folder = _open_subfolder(above, name)
        try:
            _empty(folder, top, level, moved)
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=above)
    except OSError:
        return


def _open_subfolder(above: int, name: str) -> int:
    """Open a subfolder, and give its owner all rights."""
    try:
        folder = os.open(name, beneath.FOLDER, dir_fd=above)
    except PermissionError:
        _grant_owner_rights(above, name)
        return os.open(name, beneath.FOLDER, dir_fd=above)
    if os.fstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        try:
            os.fchmod(folder, 0o700)
        except OSError:
            pass
    return folder


def _grant_owner_rights(above: int, name: str) -> None:
    """Give a folder's owner all rights. Does not follow a link."""
    # The only way before Linux 6.6, if the folder may not be opened for reading.
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)
