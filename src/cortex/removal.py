"""Removing a folder that users' code has written in. Used where jobs' folders and environments are removed: by the
operator, and on the nodes of a cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from cortex.worker import trees

log = structlog.get_logger()


def remove(folder: Path) -> None:
    """Remove a folder and all that is in it, if it is there; what withstands is logged and left. Nothing
    above it is touched."""
    with suppress(OSError):
        # A supervising process may move a job's `files` on to its next job at any moment. Under another
        # name it cannot: what is found in there to be removed is none of that job's.
        (folder / "files").rename(folder / ".files")
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except (
        RecursionError
    ):  # shutil goes down by calling itself, and a task may have made a thousand levels
        trees.remove(str(folder))
    if folder.is_dir():
        _open_up(folder)
    if folder.exists():
        shutil.rmtree(folder, onerror=_left)


def _open_up(folder: Path) -> None:
    """A task may have made folders that its own user may not look into, or not write in."""
    with suppress(OSError):
        folder.chmod(0o700)
    for parent, names, _ in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            with suppress(OSError):
                if not path.is_symlink():
                    path.chmod(0o700)


def _left(_function: Callable[..., object], path: str, _info: object) -> None:
    if Path(path).exists():
        log.warning("cannot be removed", path=path)
