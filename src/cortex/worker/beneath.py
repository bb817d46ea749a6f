"""What lies below a folder that somebody else may change at any moment, as jobs' own user may change jobs' folders. It is
reached by open folders, one name after another: a path would lead wherever a link leads that is put in it meanwhile.
"""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def opened(path: str, *names: str) -> Iterator[int]:
    """The descriptor of a folder.

    Args:
        path: of one whose name nobody else can give to another.
        names: those that lead on from there. None is followed if it is a link.

    Raises:
        OSError: it is not there, or one of them is no folder.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            above, fd = fd, os.open(name, FOLDER, dir_fd=fd)
            os.close(above)
        yield fd
    finally:
        os.close(fd)


def stat(folder: int, name: str) -> os.stat_result | None:
    """What there is by a name in an open folder, of a link the link; None if there is nothing."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def names(folder: int) -> list[str]:
    """What there is in an open folder."""
    return os.listdir(folder)
