"""Restores the files of a project that is deployed again and is already in the repository. A job
may have changed them by their paths, or an earlier version of Cortex let jobs run in the project's
folder. Called by `repository`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path


def restore_files(folder: Path, deployed: Path) -> int:
    """Make a project's files equal to a new copy of them. Files that jobs have added stay.

    Args:
        folder: the project's folder.
        deployed: the copy; the files that replace others are moved out of it.

    Returns:
        How many files and folders were restored.

    Raises:
        OSError: some files may not be restored.
    """
    restored = 0
    for parent, folders, names in os.walk(deployed):
        current = folder / Path(parent).relative_to(deployed)
        if not _ensure_usable(current):
            restored += 1
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in (*links, *names):
            if not _is_same(current / name, Path(parent, name)):
                _remove_folder(current / name)
                Path(parent, name).rename(current / name)
                restored += 1
    return restored


def _ensure_usable(folder: Path) -> bool:
    """Make it a folder that its owner can use.

    Returns:
        Whether it was one before.
    """
    info = _lstat(folder)
    if info is None or not stat.S_ISDIR(info.st_mode):
        folder.unlink(missing_ok=True)
        folder.mkdir()
        return False
    if info.st_mode & stat.S_IRWXU != stat.S_IRWXU:
        folder.chmod(0o755)
        return False
    return True


def _is_same(path: Path, deployed: Path) -> bool:
    found, expected = _lstat(path), deployed.lstat()
    if found is None or stat.S_IFMT(found.st_mode) != stat.S_IFMT(expected.st_mode):
        return False
    if stat.S_ISLNK(expected.st_mode):
        return path.readlink() == deployed.readlink()
    if found.st_size != expected.st_size or (found.st_mode ^ expected.st_mode) & 0o777:
        return False
    return _digest(path) == _digest(deployed)


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _remove_folder(path: Path) -> None:
    """Remove a folder at a path. A rename replaces anything else that is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
