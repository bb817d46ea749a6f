"""A project that is deployed again, and is there: a job that went to it by its path may have spoilt it, or an earlier
version of Cortex have let jobs run in it. Called by `kept`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path


def mend(folder: Path, again: Path) -> int:
    """Let a project be as it came in again; what jobs have added stays. How many files and folders were
    mended, which are not in `again` any more.

    Raises:
        OSError: some may be left.
    """
    mended = 0
    for parent, folders, names in os.walk(again):
        here = folder / Path(parent).relative_to(again)
        if not _is_usable(here):
            mended += 1
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in (*links, *names):
            if not _is_same(here / name, Path(parent, name)):
                _clear(here / name)
                Path(parent, name).rename(here / name)
                mended += 1
    return mended


def _is_usable(folder: Path) -> bool:
    """Whether it was a folder that can be used; it is one now."""
    about = _about(folder)
    if about is None or not stat.S_ISDIR(about.st_mode):
        folder.unlink(missing_ok=True)
        folder.mkdir()
        return False
    if about.st_mode & stat.S_IRWXU != stat.S_IRWXU:
        folder.chmod(0o755)
        return False
    return True


def _is_same(path: Path, other: Path) -> bool:
    found, wanted = _about(path), other.lstat()
    if found is None or stat.S_IFMT(found.st_mode) != stat.S_IFMT(wanted.st_mode):
        return False
    if stat.S_ISLNK(wanted.st_mode):
        return path.readlink() == other.readlink()
    if found.st_size != wanted.st_size or (found.st_mode ^ wanted.st_mode) & 0o777:
        return False
    return _digest(path) == _digest(other)


def _about(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _clear(path: Path) -> None:
    """Only a folder is in the way of a rename."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
