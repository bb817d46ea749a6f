"""What processes take of the machine's memory: their proportional set size (PSS), where a page that
several processes share counts for each of them by its share, so that a sum counts it once. Forked
processes share most of theirs; their resident sizes would count it again and again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from service import descendants

_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.M)


def pss(pids: Iterable[int]) -> float:
    """MB of these processes, those that have gone meanwhile left out."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
            total += int(found[1]) if found else 0
    return total * 1024 / 1e6


def tree(root: int) -> list[int]:
    """A process and all below it."""
    return [root, *descendants(root)]
