"""What the operator inherits. A fork server is the parent of whatever a supervising process that was killed has left;
where that is killed too, the operator is the next: what is left belongs to nobody and is ended here, also where it has
left its session and cleared its environment. Owned by the local engine.

The operator has other children, environments that are built say. What descends from a fork server is told from them
by a mark that it cannot take off (`cortex.worker.forkserver.orphans`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

import structlog

from cortex.system.background import in_thread
from cortex.worker import processes
from cortex.worker.forkserver import orphans

log = structlog.get_logger()

LONGEST_S = 5.0
_PAUSE_S = 0.01


class Orphans:
    """All of the operator's process."""

    def __init__(self, known: Callable[[], set[int]]) -> None:
        """
        Args:
            known: the fork servers and supervising processes that there are.
        """
        self._known = known
        self._there_before: set[int] = set()
        self._lock = asyncio.Lock()
        self.is_on = False

    def open(self) -> None:
        """Inherit from now on. What is there already may be supervising processes that nobody has taken over yet."""
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        self._there_before = orphans.marked(os.getpid())
        self.is_on = True

    def close(self) -> None:
        """From now on supervising processes are let go of, and end nothing that they have."""
        self.is_on = False

    async def end(self) -> None:
        """End and collect what was inherited and belongs to nobody."""
        async with self._lock:
            until = time.monotonic() + LONGEST_S
            while self.is_on and time.monotonic() < until:
                try:
                    if not await self._ended_some():
                        return
                except OSError as error:
                    log.warning("what was inherited cannot be told", error=str(error))
                await asyncio.sleep(_PAUSE_S)

    async def _ended_some(self) -> bool:
        found = await in_thread(orphans.marked, os.getpid())
        strangers = found - self._known() - self._there_before
        if not strangers or not self.is_on:
            return False
        await in_thread(_end, strangers)
        return True


def _end(pids: set[int]) -> None:
    processes.kill_all(lambda: (each for pid in pids for each in processes.tree(pid)))
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
