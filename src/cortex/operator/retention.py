"""After configured times, retention removes finished jobs, their logs, and unused versions.

A folder is removed before its row in the store: a crash in between leaves no folder without a row.
Opened by the leader.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import structlog

from cortex.engines.base import Engine
from cortex.errors import StorageUnavailable
from cortex.joblog.folders import JobFolders
from cortex.operator.config.settings import Settings
from cortex.operator.deploy.versions import Versions
from cortex.operator.logs.archive import Archive
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.spec.api import DEFAULT_DEPENDENCIES, ApiSpec
from cortex.spec.times import now_ns
from cortex.store import Store
from cortex.system.background import Background, in_thread
from cortex.system.folders import remove

if TYPE_CHECKING:
    from cortex.operator.checkpoints import Checkpoints

log = structlog.get_logger()

_BATCH = 200
_FAILED = "retention failed"
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 1.0, 60.0


class Retention:
    """Removes at regular intervals what has been kept long enough."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        engine: Engine,
        versions: Versions,
        projects: Projects,
        environments: Environments,
        archive: Archive | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._settings = settings
        self._limits = settings.retention
        self._store = store
        self._engine = engine
        self._versions = versions
        self._projects = projects
        self._environments = environments
        self._archive = archive
        self._checkpoints = checkpoints
        self._background = Background(_FAILED)
        self._is_closed = threading.Event()

    async def open(self) -> None:
        self._background.run(self._run(), "retention")

    async def close(self) -> None:
        self._is_closed.set()
        await self._background.close()

    async def _run(self) -> None:
        max_ages_s = (self._limits.jobs_s, self._limits.logs_s, self._limits.audit_s)
        ages = [age for age in max_ages_s if age is not None]
        pause_s = max(_MIN_INTERVAL_S, min([_MAX_INTERVAL_S, *(age / 10 for age in ages)]))
        while True:
            try:
                await self._sweep()
            except (StorageUnavailable, OSError) as error:
                log.warning("retention postponed", error=str(error))
            except Exception as error:  # the next round may succeed
                log.error(_FAILED, exc_info=error)
            await asyncio.sleep(pause_s)

    async def _sweep(self) -> None:
        store, limits = self._store, self._limits
        if self._archive is not None:
            await self._archive.drop_old()
        if limits.logs_s is not None:
            before_ns = _ago(limits.logs_s)
            while ids := await store.jobs_with_folder(before_ns, _BATCH):
                await self._remove_folders(ids)
                await store.note_removed_folders(ids)
        if limits.jobs_s is not None:
            before_ns = _ago(limits.jobs_s)
            while ids := await store.jobs_ended(before_ns, _BATCH):
                await self._remove_jobs(ids)
        if limits.jobs is not None:
            while ids := await store.jobs_beyond(limits.jobs, _BATCH):
                await self._remove_jobs(ids)
        await store.trim_audit(None if limits.audit_s is None else _ago(limits.audit_s))
        if limits.jobs_s is not None:
            async with self._store.deploy_lock:
                used = await self._retire_versions(_ago(limits.jobs_s))
            await in_thread(self._remove_unused, used)  # without the lock: it takes long

    async def _remove_jobs(self, ids: list[str]) -> None:
        await self._remove_folders(ids)
        await self._store.remove_jobs(ids)
        log.info("removed jobs", count=len(ids))

    async def _remove_folders(self, ids: list[str]) -> None:
        if self._archive is not None:
            await self._archive.remove(ids)
        if self._checkpoints is not None:
            await in_thread(self._checkpoints.remove, ids)
        self._engine.forget(jobs=ids)
        await in_thread(_remove_all, self._settings.job_folders, ids)

    async def _retire_versions(self, before_ns: int) -> list[ApiSpec]:
        """Remove the rows of unused versions, and move unused projects to the trash.

        Returns:
            The remaining versions.
        """
        # First: a project that is stored again meanwhile then has another time.
        last_used = await in_thread(self._projects.last_used)
        for api_id in await self._store.remove_versions(before_ns):
            self._versions.forget(api_id)
            log.info("removed version", api_id=api_id)
        remaining = await self._store.all_versions()
        await in_thread(self._retire_projects, last_used, {spec.project_id for spec in remaining})
        return remaining

    def _retire_projects(self, last_used: dict[str, int], used: set[str]) -> None:
        # In a thread, which a cancellation does not stop: hence the checks of `_is_closed`.
        for identity in last_used.keys() - used:
            if self._is_closed.is_set():
                return
            self._projects.move_to_trash(identity, last_used[identity])
        self._projects.prune_unused(used)

    def _remove_unused(self, used: list[ApiSpec]) -> None:
        for folder in self._projects.trashed_folders():
            if self._is_closed.is_set():
                return
            remove(folder)
        projects = self._projects
        wanted = {(folder, DEFAULT_DEPENDENCIES) for folder in projects.local_folders()}
        wanted |= {
            (projects.folder(spec.project_id), spec.definition.dependencies) for spec in used
        }
        self._environments.remove_unused(wanted, self._is_closed.is_set)


def _ago(seconds: float) -> int:
    """The time so many seconds ago, but not before the epoch: the store's times have 64 bits."""
    now = now_ns()
    return now - int(min(seconds * 1e9, now))


def _remove_all(folders: JobFolders, job_ids: list[str]) -> None:
    for job_id in job_ids:
        folders.remove(job_id)
