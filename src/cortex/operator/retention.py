"""Retention: removes finished jobs, their logs, unused versions and old entries of the audit log when the
settings say so. Opened while the operator leads.

A folder is removed before the row that refers to it: a crash in between leaves no folder without a row.
"""

from __future__ import annotations

import asyncio
import threading

import structlog

from cortex.errors import StorageUnavailable
from cortex.joblog.folders import JobFolders
from cortex.operator.http.context import Context
from cortex.projects.environments import Environments
from cortex.spec.api import DEFAULT_DEPENDENCIES, ApiSpec
from cortex.spec.times import now_ns
from cortex.system.background import Background, in_thread
from cortex.system.folders import remove

log = structlog.get_logger()

_BATCH = 200
_FAILED = "retention failed"
_MIN_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0


class Retention:
    """Removes in rounds, until it is closed."""

    def __init__(self, ctx: Context, environments: Environments) -> None:
        self._ctx = ctx
        self._keep = ctx.settings.keep
        self._environments = environments
        self._background = Background(_FAILED)
        self._is_over = threading.Event()

    async def open(self) -> None:
        self._background.run(self._run(), "retention")

    async def close(self) -> None:
        self._is_over.set()
        await self._background.close()

    async def _run(self) -> None:
        kept = (self._keep.jobs_s, self._keep.logs_s, self._keep.audit_s)
        ages = [age for age in kept if age is not None]
        pause_s = max(_MIN_PAUSE_S, min([_MAX_PAUSE_S, *(age / 10 for age in ages)]))
        while True:
            try:
                await self._sweep()
            except (StorageUnavailable, OSError) as error:
                log.warning("retention postponed", error=str(error))
            except Exception as error:  # the next round may succeed
                log.error(_FAILED, exc_info=error)
            await asyncio.sleep(pause_s)

    async def _sweep(self) -> None:
        store, keep = self._ctx.store, self._keep
        if self._ctx.archive is not None:
            await self._ctx.archive.drop_old()
        if keep.logs_s is not None:
            before_ns = _ago(keep.logs_s)
            while ids := await store.jobs_with_folder(before_ns, _BATCH):
                await self._remove_folders(ids)
                await store.folders_gone(ids)
        if keep.jobs_s is not None:
            before_ns = _ago(keep.jobs_s)
            while ids := await store.jobs_ended(before_ns, _BATCH):
                await self._remove_jobs(ids)
        if keep.jobs is not None:
            while ids := await store.jobs_beyond(keep.jobs, _BATCH):
                await self._remove_jobs(ids)
        await store.trim_audit(None if keep.audit_s is None else _ago(keep.audit_s))
        if keep.jobs_s is not None:
            async with self._ctx.deploying:
                used = await self._put_versions_away(_ago(keep.jobs_s))
            # After the lock: this takes long, and no other operator uses these folders.
            await in_thread(self._remove_unused, used)

    async def _remove_jobs(self, ids: list[str]) -> None:
        await self._remove_folders(ids)
        await self._ctx.store.remove_jobs(ids)
        log.info("removed jobs", count=len(ids))

    async def _remove_folders(self, ids: list[str]) -> None:
        if self._ctx.archive is not None:
            await self._ctx.archive.remove(ids)
        self._ctx.engine.forget(jobs=ids)
        await in_thread(_remove_all, self._ctx.settings.job_folders, ids)

    async def _put_versions_away(self, before_ns: int) -> list[ApiSpec]:
        """Put unused versions and projects aside for removal; the versions that are left."""
        # Before the versions are read: a project that is deployed again meanwhile stays.
        here = await in_thread(self._ctx.projects.here)
        for api_id in await self._ctx.store.remove_versions(before_ns):
            self._ctx.versions.forget(api_id)
            log.info("removed version", api_id=api_id)
        left = await self._ctx.store.all_versions()
        await in_thread(self._put_projects_away, here, {spec.project_id for spec in left})
        return left

    def _put_projects_away(self, here: dict[str, int], used: set[str]) -> None:
        """Runs in a thread, which goes on after `close`: `_is_over` ends it."""
        for identity in here.keys() - used:
            if self._is_over.is_set():
                return
            self._ctx.projects.put_away(identity, here[identity])
        self._ctx.projects.forget_all_but(used)

    def _remove_unused(self, used: list[ApiSpec]) -> None:
        """Runs in a thread, like `_put_projects_away`."""
        for folder in self._ctx.projects.to_remove():
            if self._is_over.is_set():
                return
            remove(folder)
        projects = self._ctx.projects
        wanted = {(folder, DEFAULT_DEPENDENCIES) for folder in projects.folders()}
        wanted |= {
            (projects.folder(spec.project_id), spec.definition.dependencies) for spec in used
        }
        self._environments.remove_all_but(wanted, self._is_over.is_set)


def _ago(seconds: float) -> int:
    return now_ns() - int(seconds * 1e9)


def _remove_all(folders: JobFolders, job_ids: list[str]) -> None:
    for job_id in job_ids:
        folders.remove(job_id)
