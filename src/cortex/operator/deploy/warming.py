"""The leader's work after a deploy: it makes each deployed version ready, warms a fork server for
it, and uploads the projects that the object store lacks. Opened by `ha.leadership`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import structlog

from cortex.engines.base import Engine
from cortex.errors import StorageUnavailable
from cortex.operator.deploy.catalogue import Catalogue, DeployedApi
from cortex.operator.deploy.versions import VersionBlocked, Versions, VersionUnusable
from cortex.projects.repository import Projects
from cortex.store import Store
from cortex.system.background import Background, in_thread, retrying

log = structlog.get_logger()

_RETRY_DELAY_S = 10.0


class Warmer:
    """One for each term of a leader. All methods are called on the event loop."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        catalogue: Catalogue,
        versions: Versions,
        projects: Projects,
    ) -> None:
        self._store = store
        self._engine = engine
        self._catalogue = catalogue
        self._versions = versions
        self._projects = projects
        self._background = Background("post-deploy task failed")
        self._warming: dict[str, asyncio.Task[None]] = {}  # by version

    async def open(self) -> None:
        """Warm what is deployed now and what will be, and send the object store what it lacks."""
        used = {spec.project_id for spec in await self._store.all_versions()}
        self._background.run(self._send_missing(used), "send missing projects")
        self._catalogue.subscribe(self)
        for api in self._catalogue.all():
            self.api_deployed(api, None)

    async def close(self) -> None:
        """Stop all of it."""
        self._catalogue.unsubscribe(self)
        await self._background.close()

    def api_deployed(self, api: DeployedApi, before: DeployedApi | None) -> None:
        """See `CatalogueListener`."""
        if before is not None and before.api_id == api.api_id:
            return
        if before is not None:
            self._engine.forget(versions=[before.api_id])
        self._background.run(self._warm(api.api_id), f"warm {api.api_id}")
        if before is not None:
            self._background.run(
                self._supersede(before.api_id, api.api_id), f"supersede {before.api_id}"
            )

    def api_removed(self, name: str, api_ids: Collection[str]) -> None:
        """See `CatalogueListener`."""
        self._engine.forget(versions=list(api_ids))
        for api_id in api_ids:
            self._stop_warming(api_id)

    def _stop_warming(self, api_id: str) -> None:
        """Cancel a build that no job waits for."""
        if (warming := self._warming.pop(api_id, None)) is not None:
            warming.cancel()

    async def _supersede(self, before: str, after: str) -> None:
        # Where both have the same requirements, the later version goes on with the build of the
        # earlier one.
        await self._versions.build_has_begun(after)
        self._stop_warming(before)

    async def _warm(self, api_id: str) -> None:
        warming = asyncio.current_task()
        if warming is None or all(api.api_id != api_id for api in self._catalogue.all()):
            return
        self._warming[api_id] = warming
        try:
            version = await self._versions.make_ready(api_id)
            # Under the lock: a version of an API that is being deleted is not warmed.
            async with self._store.deploy_lock:
                current = await self._store.deployments()
                if any(deployment.spec.api_id == api_id for deployment in current):
                    self._engine.warm(version)
        except VersionUnusable as error:  # each of its jobs reports the reason in its log
            log.warning("not ready for jobs", api_id=api_id, reason=error.reason)
        except (VersionBlocked, StorageUnavailable) as error:  # the first job makes another attempt
            log.warning("not ready for jobs yet", api_id=api_id, reason=str(error))
        finally:
            self._warming.pop(api_id, None)

    async def _send_missing(self, used: set[str]) -> None:
        await retrying(
            lambda: in_thread(self._projects.upload_missing, used),
            (StorageUnavailable, OSError),
            delay_s=_RETRY_DELAY_S,
            warning="cannot send projects to the object store yet",
        )
