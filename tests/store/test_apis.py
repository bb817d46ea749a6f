"""APIs in the store: a deploy and a deletion are each one commit."""

from __future__ import annotations

import pytest

from cortex.errors import Conflict, NotFound
from cortex.spec.lifecycle import Event
from cortex.store import Store
from store.store_harness import draft, end, spec, with_store


def test_deleting_an_api_stops_its_jobs_in_progress(store_url: str) -> None:
    async def work(store: Store) -> None:
        waiting, _ = await store.submit(draft())
        done, _ = await store.submit(draft())
        await store.apply(done.spec.job_id, end(Event.LOSE, attempt=0))
        stopped = await store.undeploy("a", "deleted")
        assert [job.spec.job_id for job in stopped] == [waiting.spec.job_id]
        with pytest.raises(NotFound):
            await store.undeploy("a", "deleted")
        with pytest.raises(NotFound):
            await store.submit(draft())

    with_store(store_url, work)


def test_a_deploy_stores_all_of_its_apis_or_none(store_url: str) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(Conflict):
            await store.deploy([spec("b"), spec("c", endpoint="a")])
        assert [d.name for d in await store.deployments()] == ["a"]

    with_store(store_url, work)
