"""Ends the processes that the operator inherits from killed fork servers. Owned by the local
engine.

A fork server is the parent of all processes that its killed supervisors left. If the fork server is
killed, the operator becomes their parent. No supervisor is responsible for these orphans: the
operator ends them, even if they have left their session and cleared their environment.

The operator has other children, for example builds of environments. Descendants of a fork server
have a mark that they cannot remove (`cortex.worker.forkserver.orphans`).
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

END_TIMEOUT_S = 5.0
_POLL_INTERVAL_S = 0.01


class Orphans:
    """The orphans that the operator's process inherits."""

    def __init__(self, known: Callable[[], set[int]]) -> None:
        """
        Args:
            known: the pids of the engine's fork servers and supervisors, which are no orphans.
        """
        self._known = known
        self._older: set[int] = set()
        self._lock = asyncio.Lock()
        self.is_inheriting = False

    def open(self) -> None:
        """Inherit orphans from now on. Children that exist already are spared: they may be
        supervisors that no operator has adopted yet."""
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        self._older = orphans.marked(os.getpid())
        self.is_inheriting = True

    def close(self) -> None:
        """End no orphans from now on: the engine detaches from its supervisors."""
        self.is_inheriting = False

    async def end_orphans(self) -> None:
        """Kill and reap the orphans of the operator's process."""
        async with self._lock:
            until = time.monotonic() + END_TIMEOUT_S
            while self.is_inheriting and time.monotonic() < until:
                try:
                    if not await self._end_some():
                        return
                except OSError as error:
                    log.warning("cannot list inherited processes", error=str(error))
                await asyncio.sleep(_POLL_INTERVAL_S)

    async def _end_some(self) -> bool:
        found = await in_thread(orphans.marked, os.getpid())
        unknown = found - self._known() - self._older
        if not unknown or not self.is_inheriting:
            return False
        await in_thread(_kill, unknown)
        return True


def _kill(pids: set[int]) -> None:
    processes.kill_all(lambda: (each for pid in pids for each in processes.tree(pid)))
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
