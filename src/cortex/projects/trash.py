"""Folders that are put away, to be removed, while somebody who finds one there may come to count on it. Called
by `kept`.

Two operators that share a folder take turns. One that hung may go on when its turn is long over, so neither
relies on the turn alone: whoever counts on a folder touches it first, and whoever puts it away looks whether
it is as it was when nothing used it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from cortex.spec.times import new_id

_GONE = ".gone-"


def touch(folder: Path) -> bool:
    """Count on a folder from now on; False where it is not there."""
    now_ns = time.time_ns()
    try:
        os.utime(folder, ns=(now_ns, now_ns))
    except FileNotFoundError:
        return False
    return True


def touched(folder: Path) -> int:
    """When somebody did so last; -1 where it is not there."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return -1


def put_away(folder: Path, when: int) -> None:
    """Put a folder away at one stroke, unless somebody has counted on it since."""
    gone = folder.with_name(f"{_GONE}{folder.name}-{new_id()}")
    if touched(folder) != when:
        return
    folder.rename(gone)
    if touched(gone) != when:  # right in between
        with suppress(OSError):  # another has come in its place
            gone.rename(folder)


def to_remove(root: Path) -> list[Path]:
    """What was put away, by anybody."""
    return list(root.glob(f"{_GONE}*"))
