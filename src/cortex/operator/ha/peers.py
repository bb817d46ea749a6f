"""The other operators on the store: what they change is heard of, and whoever drives is known. Opened by
the app for a store that can be shared.
"""

from __future__ import annotations

import asyncio

import structlog

from cortex.errors import StorageUnavailable
from cortex.operator.deploy.deployer import Deployer
from cortex.operator.ha.forwarding import LeaderProxy
from cortex.operator.ha.shared_jobs import SharedJobs
from cortex.store import LeaderCallbacks, Store

log = structlog.get_logger()

_AGAIN_S = 1.0


class Peers:
    """All of it happens on the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._apis_changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.relay = LeaderProxy(store, lambda: self.jobs.drives)
        self.jobs = SharedJobs(store, self._apis_changed.set, self.relay.driver_changed)

    async def open(self, deployer: Deployer, candidate: LeaderCallbacks, lease_s: float) -> None:
        """Hear of all changes, and then stand for driving.

        Raises:
            StartupError: as `LeaderCallbacks.drive` does.
        """
        self._task = asyncio.create_task(self._refresh(deployer), name="changed APIs")
        await self._store.operators.listen(self.jobs)
        await self._store.operators.campaign(candidate, lease_s)

    async def close(self) -> None:
        """Stop driving, and hear nothing more."""
        await self._store.operators.leave()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.relay.close()

    async def _refresh(self, deployer: Deployer) -> None:
        while True:
            await self._apis_changed.wait()
            self._apis_changed.clear()
            try:
                await deployer.refresh()
            except StorageUnavailable as error:
                log.warning("what other operators deployed cannot be read", error=error.message)
                self._apis_changed.set()
                await asyncio.sleep(_AGAIN_S)
