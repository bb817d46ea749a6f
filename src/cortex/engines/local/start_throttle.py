"""How many supervising processes of a crew begin with their orders at the same time; the other orders wait
their turn. Owned by `crew`.

More of them than the cores can take up would share the time and the caches of these: all begin later, and each
costs more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from cortex.engines.local.supervisor import SupervisorHandle

MOST = 3 * len(os.sched_getaffinity(0))
LONGEST_S = 1.0
"""After which one counts as having begun: its job may have stopped it before it could say so."""


class StartThrottle:
    """Those that are under way."""

    def __init__(self, room: Callable[[], None]) -> None:
        """
        Args:
            room: called when one that has said nothing counts no more.
        """
        self._since: dict[SupervisorHandle, float] = {}  # by the loop's clock, in this order
        self._room = room
        self._timer: asyncio.TimerHandle | None = None

    @property
    def room(self) -> int:
        """How many more may begin."""
        return MOST - len(self._since)

    def begins(self, supervisor: SupervisorHandle) -> None:
        """One has got its order."""
        self._since[supervisor] = asyncio.get_running_loop().time()
        self._look_later()

    def has_begun(self, supervisor: SupervisorHandle) -> None:
        """One has said that its job started or ended, or is gone."""
        self._since.pop(supervisor, None)

    def close(self) -> None:
        """Nothing is told any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        before = asyncio.get_running_loop().time() - LONGEST_S
        for supervisor, since in list(self._since.items()):
            if since <= before:
                del self._since[supervisor]
        if self.room > 0:
            self._room()
        self._look_later()

    def _look_later(self) -> None:
        """While there is no room, unless that is so already."""
        if self._timer is None and self.room <= 0:
            self._timer = asyncio.get_running_loop().call_later(LONGEST_S, self._look)
