"""Folders that jobs have written in: a path may be too deep to open, a folder closed to its own owner. Called by the
ways of a `workspace`, and by who removes jobs' folders and environments.
"""

from __future__ import annotations

import os
import stat
import time

from cortex.worker import beneath

BYTE_CODE = "__pycache__"
KEPT = "own"
"""In a job's folder: what the job made or changed of its project."""
_DEEPEST = 50


def look(root: str) -> dict[str, tuple[int, ...]]:
    """What is below a folder, by its path from there, and what changes with it; but for byte code."""
    found: dict[str, tuple[int, ...]] = {}
    folders = [""]
    for folder in folders:  # which grows meanwhile
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
            continue  # closed to this user
    return found


def remove(path: str) -> None:
    """Remove whatever is there, as far as that is possible.

    Args:
        path: no folder above it may be one that others can change and this user has more rights than they have.
    """
    above, name = os.path.split(path)
    try:
        with beneath.opened(above) as folder:
            remove_from(folder, name)
    except OSError:
        return


def remove_from(folder: int, name: str) -> None:
    """Remove what has this name in an open folder, as far as that is possible. Whatever is moved or linked meanwhile,
    nothing is touched but what is below."""
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
        top = _entered(folder, name)
        try:
            _empty(top, top, 0, moved)
            for each in moved:  # which grows meanwhile
                _remove_folder(top, each, top, 1, moved)
        finally:
            os.close(top)
        os.rmdir(name, dir_fd=folder)
    except OSError:
        return


def clear_kept(folder: int, aside: str) -> None:
    """Let a job's folder have nothing by the name of `KEPT`: an earlier attempt's, or whatever the job put there.

    Args:
        aside: a new path on the same file system, from where that is removed.
    """
    remove(aside)
    try:
        os.rename(KEPT, aside, src_dir_fd=folder)
    except FileNotFoundError:
        return
    remove(aside)


def _empty(folder: int, top: int, level: int, moved: list[str]) -> None:
    """Remove what is in an open folder. What is deep down is moved up to the top, for each level that is gone down
    takes a descriptor: its names there are added to those that are moved."""
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        try:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=folder)
            elif level < _DEEPEST:
                _remove_folder(folder, entry.name, top, level + 1, moved)
            else:
                _open_up(folder, entry.name)  # to move a folder is to write in it: its `..`
                name = f".removed-{time.monotonic_ns()}"
                os.rename(entry.name, name, src_dir_fd=folder, dst_dir_fd=top)
                moved.append(name)
        except OSError:
            continue


def _remove_folder(above: int, name: str, top: int, level: int, moved: list[str]) -> None:
    try:
        folder = _entered(above, name)
        try:
            _empty(folder, top, level, moved)
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=above)
    except OSError:
        return


def _entered(above: int, name: str) -> int:
    """A folder that is open, and that its owner may look into and write in from now on."""
    try:
        folder = os.open(name, beneath.FOLDER, dir_fd=above)
    except PermissionError:
        _open_up(above, name)
        return os.open(name, beneath.FOLDER, dir_fd=above)
    if os.fstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        try:
            os.fchmod(folder, 0o700)
        except OSError:
            pass
    return folder


def _open_up(above: int, name: str) -> None:
    """Give a folder's owner all rights; a link is not followed."""
    # The one way to do so before Linux 6.6 for what may not be opened for reading.
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)
