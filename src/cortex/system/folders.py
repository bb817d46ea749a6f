"""Removing a folder that users' code has written in. Used where jobs' folders and environments are removed: by the
operator, and on the nodes of a cluster. Jobs of another user may be at it meanwhile, and the operator has more rights
than they have: nothing in there is done by its path.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import structlog

from cortex.worker import beneath, trees

log = structlog.get_logger()


def remove(folder: Path) -> None:
    """Remove a folder and all that is in it, if it is there; one that withstands is logged and left. Nothing
    above it is touched.

    Args:
        folder: in one where nobody else may write.
    """
    with suppress(FileNotFoundError), beneath.opened(str(folder.parent)) as above:
        remove_from(above, folder)


def remove_from(above: int, folder: Path) -> None:
    """The same, where others may write in the folder above.

    Args:
        above: that one, open.
    """
    name = folder.name
    with suppress(OSError):
        # A supervising process may move a job's `files` on to its next job at any moment. Under another
        # name it cannot: what is found in there to be removed is none of that job's.
        fd = os.open(name, beneath.FOLDER, dir_fd=above)
        try:
            os.rename("files", ".files", src_dir_fd=fd, dst_dir_fd=fd)
        finally:
            os.close(fd)
    trees.remove_from(above, name)
    if beneath.stat(above, name) is not None:
        log.warning("cannot be removed", path=str(folder))
