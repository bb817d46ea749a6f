"""This operator among those that share its store: it is notified of their changes, stands for
election, and forwards to the leader what only the leader can answer. Alone on its store, it leads.
"""

from __future__ import annotations

import asyncio

from cortex.errors import StorageUnavailable
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.dispatch.jobs import Jobs
from cortex.operator.ha.forwarding import LeaderProxy
from cortex.store import LeaderCallbacks, Store
from cortex.system.background import retrying

_RETRY_DELAY_S = 1.0


class Peers:
    """All methods are called on the event loop."""

    def __init__(self, store: Store, catalogue: Catalogue) -> None:
        self._store = store
        self._catalogue = catalogue
        self._apis_changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.leader = LeaderProxy(store)
        self.jobs = Jobs(store, self._apis_changed.set, self.leader.leader_changed)

    async def open(self, callbacks: LeaderCallbacks, lease_s: float) -> None:
        """Subscribe to the changes of other operators, and stand for election.

        Raises:
            StartupError: as `LeaderCallbacks.lead` does.
        """
        self._task = asyncio.create_task(self._refresh(), name="changed APIs")
        await self._store.operators.subscribe(self.jobs)
        await self._store.operators.join_election(callbacks, lease_s)
        if not self.jobs.is_leader:  # a leader has read it in its first step
            await self._catalogue.refresh()

    async def close(self) -> None:
        """Step down, and end all subscriptions."""
        await self._store.operators.leave()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.leader.close()

    async def _refresh(self) -> None:
        while True:
            await self._apis_changed.wait()
            self._apis_changed.clear()
            await retrying(
                self._catalogue.refresh,
                (StorageUnavailable,),
                delay_s=_RETRY_DELAY_S,
                warning="cannot read what other operators deployed",
            )
