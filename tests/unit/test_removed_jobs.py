"""Jobs that are removed while somebody asks for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from cortex.operator.app import create_app
from cortex.operator.config.settings import Settings
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.versions import Versions
from cortex.operator.dispatch.jobs import Jobs
from cortex.operator.ha.forwarding import LeaderProxy
from cortex.operator.http.context import Context
from cortex.operator.http.views import Renderer
from cortex.projects.repository import Projects
from cortex.spec.api import ApiSpec
from cortex.spec.audit import Actor
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import State
from cortex.spec.times import now_ns
from cortex.store import Outcome, Store
from store.test_jobs import draft, path_to, spec


async def remove(store: Store, job_id: str) -> None:
    """Let a job end, and retention remove it."""
    for event in path_to(State.SUCCEEDED):
        await store.apply(job_id, event)
    await store.remove_jobs([job_id])


class Removed(Jobs):
    """A job is removed right before what is asked of it is done."""

    async def stop(self, job_id: str, actor: Actor) -> Outcome:
        await remove(self._store, job_id)
        return await super().stop(job_id, actor)

    async def next_record(self, job_id: str, within_s: float) -> JobRecord | None:
        await remove(self._store, job_id)
        return await super().next_record(job_id, within_s)


class RemovedVersions(Versions):
    """A version is removed, with its jobs, right before it is asked for."""

    async def spec(self, api_id: str) -> ApiSpec:
        for job in (await self._store.list_jobs("a", limit=10)).jobs:
            await remove(self._store, job.spec.job_id)
        await self._store.deploy([spec()])
        await self._store.remove_versions(now_ns())
        return await super().spec(api_id)


@pytest.mark.parametrize(
    ("method", "at"),
    [("GET", "/-/apis/a/jobs/{}?wait=30"), ("DELETE", "/-/apis/a/jobs/{}"), ("GET", "/a/{}")],
)
def test_a_job_that_is_removed_while_it_is_asked_for_is_not_found(
    tmp_path: Path, method: str, at: str
) -> None:
    async def ask() -> httpx.Response:
        store = Store(f"sqlite:///{tmp_path / 'operator.db'}")
        versions = RemovedVersions(store, Projects(tmp_path, tmp_path), None)
        jobs = Removed(store, lambda: None, lambda: None)
        none: Any = None
        catalogue = Catalogue(store, others_deploy=False)
        ctx = Context(
            Settings(tmp_path), store, jobs, catalogue, versions, Renderer(store, jobs), none,
            LeaderProxy(store),
        )  # fmt: skip
        try:
            await store.deploy([spec()])
            await catalogue.refresh()
            job, _ = await store.submit(draft())
            app = httpx.ASGITransport(cast(Any, create_app(ctx, none, none)))
            async with httpx.AsyncClient(transport=app, base_url="http://localhost") as http:
                return await http.request(method, at.format(job.spec.job_id), timeout=60)
        finally:
            store.close()

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["kind"]) == (404, "not_found")
    assert "--keep-jobs" in answer.json()["message"]
