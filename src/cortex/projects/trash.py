"""Two-phase removal of folders: rename a folder to trash, then delete the trash. Called by
`repository` and `environments`.

Operators that share a data folder take turns by a lock of the database. An operator that hung may
continue after it has lost the lock, so the lock alone does not protect a project's folder.
Therefore each deploy or fetch of a project first updates the modification time of its folder, and
`move_if_unused` renames the folder only if that time is still what it was before the project was
found to be unused.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from cortex.spec.times import new_id

_PREFIX = ".gone-"


def mark_used(folder: Path) -> bool:
    """Record a use of a folder as its modification time.

    Returns:
        Whether the folder exists.
    """
    now_ns = time.time_ns()
    try:
        os.utime(folder, ns=(now_ns, now_ns))
    except FileNotFoundError:
        return False
    return True


def last_used_ns(folder: Path) -> int:
    """The time of the last `mark_used`; -1 if the folder does not exist."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return -1


def move(folder: Path) -> Path:
    """Rename a folder to trash, which is atomic.

    Returns:
        The folder's path in the trash.
    """
    trashed = folder.with_name(f"{_PREFIX}{folder.name}-{new_id()}")
    folder.rename(trashed)
    return trashed


def move_if_unused(folder: Path, used_ns: int) -> None:
    """Rename a folder to trash, unless it has been used since.

    Args:
        used_ns: its `last_used_ns`, read before the folder was found to be unused.
    """
    if last_used_ns(folder) != used_ns:
        return
    trashed = move(folder)
    if last_used_ns(trashed) != used_ns:  # used between the check and the rename
        with suppress(OSError):  # a new folder has the name already
            trashed.rename(folder)


def trashed_folders(root: Path) -> list[Path]:
    """The trash in a folder, whichever operator moved it there."""
    return list(root.glob(f"{_PREFIX}*"))
