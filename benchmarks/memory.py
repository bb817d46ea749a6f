"""The memory of processes: their proportional set size (PSS). Each process that shares a page
counts its share of the page, and the sum counts the page once. Forked processes share most of their
pages; the sum of their resident sizes would count each page many times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from service import descendants

_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.M)


def pss(pids: Iterable[int]) -> float:
    """MB of these processes, without those that have exited."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
            total += int(found[1]) if found else 0
    return total * 1024 / 1e6


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    return [root, *descendants(root)]
