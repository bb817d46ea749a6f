"""Removes a folder that users' code has written to, such as a job's folder or an environment.

The operator and the agents on the nodes use it. Jobs of another user may change the folder
meanwhile, and the operator has more rights than they have, so nothing inside is addressed by its
path.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import structlog

from cortex.worker import beneath, trees

log = structlog.get_logger()


def remove(folder: Path) -> None:
    """Remove a folder with its content, if it exists. Logs a folder that cannot be removed.

    Args:
        folder: its parent must be writable for this user alone.
    """
    with suppress(FileNotFoundError), beneath.opened(str(folder.parent)) as above:
        remove_from(above, folder)


def remove_from(above: int, folder: Path) -> None:
    """Remove a folder as `remove` does, if others may write to its parent.

    Args:
        above: descriptor of the parent.
    """
    name = folder.name
    with suppress(OSError):
        # A supervisor may move a job's `files` on to its next job at any moment. It cannot after
        # this rename, so the removal deletes nothing of the next job.
        fd = os.open(name, beneath.FOLDER, dir_fd=above)
        try:
            os.rename("files", ".files", src_dir_fd=fd, dst_dir_fd=fd)
        finally:
            os.close(fd)
    trees.remove_from(above, name)
    if beneath.stat(above, name) is not None:
        log.warning("folder cannot be removed", path=str(folder))
