"""Retention in the store: which jobs and versions may be removed."""

from __future__ import annotations

from cortex.spec.job import JobSpec
from cortex.spec.lifecycle import Event, State
from cortex.spec.times import now_ns
from cortex.store import Replay, Store
from store.store_harness import draft, end, events_to, spec, stored_ids, with_store

FOREVER_NS = 2**62


async def finished_job(
    store: Store, after_ns: int = 1, job: JobSpec | None = None, replay: Replay | None = None
) -> str:
    """Submit a job, which ends so long after its submit; its id."""
    job = job or draft()
    await store.submit(job, replay)
    for event in events_to(State.RUNNING):
        await store.apply(job.job_id, event)
    ended = await store.apply(job.job_id, end(Event.SUCCEED, end_ns=job.created_ns + after_ns))
    assert ended.taken
    return job.job_id


def test_jobs_without_a_folder_come_first_then_the_oldest_end(store_url: str) -> None:
    async def work(store: Store) -> None:
        await store.submit(draft())  # it has not ended
        late, early, without_folder = [
            await finished_job(store, seconds * 10**9) for seconds in (3000, 1000, 2000)
        ]
        await store.note_removed_folders([without_folder])
        assert await store.jobs_with_folder(FOREVER_NS, 10) == [early, late]
        assert await store.jobs_with_folder(FOREVER_NS, 1) == [early]
        assert await store.jobs_ended(FOREVER_NS, 10) == [without_folder, early, late]
        assert await store.jobs_ended(FOREVER_NS, 2) == [without_folder, early]
        assert await store.jobs_ended(now_ns(), 10) == []

    with_store(store_url, work)


def test_the_newest_finished_jobs_of_each_api_stay(store_url: str) -> None:
    async def work(store: Store) -> None:
        await store.deploy([spec("b")])
        oldest, older, _newest = [await finished_job(store) for _ in range(3)]
        of_b = [await finished_job(store, job=draft("b")) for _ in range(2)]
        assert set(await store.jobs_beyond(1, 10)) == {oldest, older, of_b[0]}
        assert await store.jobs_beyond(3, 10) == []
        assert len(await store.jobs_beyond(1, 2)) == 2

    with_store(store_url, work)


def test_a_removed_job_frees_its_key_and_a_job_in_progress_is_not_removed(store_url: str) -> None:
    async def work(store: Store) -> None:
        replay = Replay("key", "hash")
        waiting = draft()
        ended = await finished_job(store, replay=replay)
        await store.submit(waiting)
        await store.remove_jobs([ended, waiting.job_id])
        assert await stored_ids(store) == [waiting.job_id]
        _, is_new = await store.submit(draft(), replay)
        assert is_new

    with_store(store_url, work)


def test_a_version_is_removed_when_neither_its_api_nor_a_job_uses_it(store_url: str) -> None:
    async def work(store: Store) -> None:
        used_by_a_job, unused, current = spec(), spec(), spec()
        [first] = [deployment.spec.api_id for deployment in await store.deployments()]
        await store.deploy([used_by_a_job])
        job_id = await finished_job(store)
        await store.deploy([unused])
        await store.deploy([current])
        assert await store.remove_versions(1) == []
        assert set(await store.remove_versions(FOREVER_NS)) == {first, unused.api_id}
        await store.remove_jobs([job_id])
        assert await store.remove_versions(FOREVER_NS) == [used_by_a_job.api_id]
        assert [version.api_id for version in await store.versions("a")] == [current.api_id]
        assert await store.version(unused.api_id) is None

    with_store(store_url, work)
