"""Requests for a job that retention removes meanwhile."""

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
from store.store_harness import draft, events_to, spec


async def remove(store: Store, job_id: str) -> None:
    """Let a job end and remove it, as retention does."""
    for event in events_to(State.SUCCEEDED):
        await store.apply(job_id, event)
    await store.remove_jobs([job_id])


class RemovingJobs(Jobs):
    """Removes a job right before it stops the job or waits for it."""

    async def stop(self, job_id: str, actor: Actor) -> Outcome:
        await remove(self._store, job_id)
        return await super().stop(job_id, actor)

    async def next_record(self, job_id: str, within_s: float) -> JobRecord | None:
        await remove(self._store, job_id)
        return await super().next_record(job_id, within_s)


class RemovingVersions(Versions):
    """Removes a version, with its jobs, right before it reads the version."""

    async def spec(self, api_id: str) -> ApiSpec:
        for job in (await self._store.list_jobs("a", limit=10)).jobs:
            await remove(self._store, job.spec.job_id)
        await self._store.deploy([spec()])
        await self._store.remove_versions(now_ns())
        return await super().spec(api_id)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/-/apis/a/jobs/{}?wait=30"), ("DELETE", "/-/apis/a/jobs/{}"), ("GET", "/a/{}")],
)
def test_a_request_for_a_job_that_is_removed_meanwhile_is_answered_not_found(
    tmp_path: Path, method: str, path: str
) -> None:
    async def request() -> httpx.Response:
        store = Store(f"sqlite:///{tmp_path / 'operator.db'}")
        versions = RemovingVersions(store, Projects(tmp_path, tmp_path), None)
        jobs = RemovingJobs(store, lambda: None, lambda: None)
        unused: Any = None
        catalogue = Catalogue(store, others_deploy=False)
        ctx = Context(
            Settings(tmp_path), store, jobs, catalogue, versions, Renderer(store, jobs), unused,
            LeaderProxy(store),
        )  # fmt: skip
        try:
            await store.deploy([spec()])
            await catalogue.refresh()
            job, _ = await store.submit(draft())
            app = httpx.ASGITransport(cast(Any, create_app(ctx, unused, unused)))
            async with httpx.AsyncClient(transport=app, base_url="http://localhost") as http:
                return await http.request(method, path.format(job.spec.job_id), timeout=60)
        finally:
            store.close()

    answer = asyncio.run(request())
    assert (answer.status_code, answer.json()["kind"]) == (404, "not_found")
    assert "--keep-jobs" in answer.json()["message"]
