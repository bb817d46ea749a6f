"""Folders that jobs have written in: a path may be too deep to open, a folder closed to its own owner. Called by the
ways of a `workspace`.
"""

from __future__ import annotations

import os
import stat

BYTE_CODE = "__pycache__"
KEPT = "own"
"""In a job's folder: what the job made or changed of its project."""
_MAX_PATH = 2000


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
    """Remove whatever is there, as far as that is possible."""
    try:
        mode = os.lstat(path).st_mode
        if not stat.S_ISDIR(mode):
            os.unlink(path)
            return
    except OSError:
        return
    folders = [path]
    for folder in folders:  # which grows meanwhile
        below = _emptied(folder)
        if len(folder) > _MAX_PATH:  # no system call takes a path of twice that length
            below = [_moved_up(each, f"{path}/{len(folders)}.{n}") for n, each in enumerate(below)]
        folders += below
    for folder in reversed(folders):
        try:
            os.rmdir(folder)
        except OSError:
            continue


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


def _moved_up(folder: str, place: str) -> str:
    try:
        os.rename(folder, place)
    except OSError:
        return folder
    return place


def _emptied(folder: str) -> list[str]:
    """The folders in a folder, from which everything else is removed."""
    below = []
    try:
        os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                else:
                    os.unlink(entry.path)
    except OSError:
        pass
    return below
