"""Safe access to files below a folder that another user may change at any moment.

The user of the jobs can change the jobs' folders. Each name is opened relative to an open folder: a
path would follow any link that a job puts into it meanwhile.
"""

from __future__ import annotations

import contextlib
import os

from cortex.worker import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def opened(path: str, *names: str) -> Iterator[int]:
    """Open a folder; its descriptor.

    Args:
        path: a folder that no untrusted user can rename or replace.
        names: the names of the folders from there on. Links are not followed.

    Raises:
        OSError: a folder does not exist, or one of the names is not a folder.
    """
    fd = files.open_folder(path)
    try:
        for name in names:
            above, fd = fd, os.open(name, FOLDER, dir_fd=fd)
            os.close(above)
        yield fd
    finally:
        os.close(fd)


def stat(folder: int, name: str) -> os.stat_result | None:
    """The status of a name in an open folder (of a link itself); None if there is no such name."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def names(folder: int) -> list[str]:
    """The names in an open folder."""
    return os.listdir(folder)
