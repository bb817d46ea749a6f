"""Jobs that are removed while somebody asks for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from cortex.operator.app import create_app
from cortex.operator.context import Context
from cortex.operator.render import Renderer
from cortex.operator.settings import Settings
from cortex.operator.shared import SharedJobs
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import State
from cortex.store import Outcome, Store
from unit.test_store import draft, path_to, spec


class Removed(SharedJobs):
    """A job ends and is removed right before what is asked of it is done."""

    async def stop(self, job_id: str) -> Outcome:
        await self._remove(job_id)
        return await super().stop(job_id)

    async def next(self, job_id: str, within_s: float) -> JobRecord | None:
        await self._remove(job_id)
        return await super().next(job_id, within_s)

    async def _remove(self, job_id: str) -> None:
        for event, facts in path_to(State.SUCCEEDED):
            await self._store.apply(job_id, event, facts)
        await self._store.remove_jobs([job_id])


@pytest.mark.parametrize(("method", "query"), [("GET", "?wait=30"), ("DELETE", "")])
def test_a_job_that_is_removed_while_it_is_asked_for_is_not_found(
    tmp_path: Path, method: str, query: str
) -> None:
    async def ask() -> httpx.Response:
        store = Store(f"sqlite:///{tmp_path / 'operator.db'}")
        jobs = Removed(store, lambda: None, lambda: None)
        none: Any = None
        ctx = Context(
            Settings(tmp_path), store, none, none, jobs, Renderer(store, jobs), none, none,
            store.in_turn(),
        )  # fmt: skip
        try:
            await store.deploy([spec()])
            job, _ = await store.submit(draft())
            app = httpx.ASGITransport(cast(Any, create_app(ctx, none)))
            async with httpx.AsyncClient(transport=app, base_url="http://localhost") as http:
                return await http.request(
                    method, f"/-/apis/a/jobs/{job.spec.job_id}{query}", timeout=60
                )
        finally:
            store.close()

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["kind"]) == (404, "not_found")
    assert "--keep-jobs" in answer.json()["message"]
