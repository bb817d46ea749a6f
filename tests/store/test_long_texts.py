"""Configs and results that are too long for a job's row."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import select

from cortex.spec.job import JobRecord, encode
from cortex.spec.lifecycle import Event
from cortex.store import Replay, Store
from cortex.store.database import connect
from cortex.store.schema import long_texts
from store.store_harness import EVENTS, draft, end, with_store

LONG = encode({"text": "ä" * 5000})


def stored_texts(store_url: str) -> int:
    """How many long texts the database has."""
    engine = connect(store_url)
    with engine.connect() as connection:
        found = connection.execute(select(long_texts.c.seq)).all()
    engine.dispose()
    return len(found)


def test_only_a_claim_and_the_whole_job_have_a_long_config(store_url: str) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(replace(draft(), config=LONG))
        job_id = job.spec.job_id
        assert job.spec.config == LONG
        without = replace(job, spec=replace(job.spec, config=None))
        assert await store.job(job_id) == without
        assert (await store.list_jobs("a", limit=10)).jobs == [without]
        assert await store.jobs([job_id]) == await store.jobs_in_progress() == [without]
        assert await store.whole_job(job_id) == job
        claimed = (await store.apply(job_id, EVENTS[Event.CLAIM], without.spec)).job
        assert claimed is not None
        assert claimed.spec.config == LONG
        started = (await store.apply(job_id, EVENTS[Event.START])).job
        assert started is not None
        assert started.spec.config is None
        assert await store.whole_job("nothing") is None

    with_store(store_url, work)


def test_a_long_result_is_stored_unless_the_job_was_stopped(store_url: str) -> None:
    async def ended(store: Store, *, stop: bool) -> JobRecord:
        job, _ = await store.submit(draft())
        job_id = job.spec.job_id
        for step in (Event.CLAIM, Event.START, *([Event.STOP] if stop else [])):
            assert (await store.apply(job_id, EVENTS[step])).taken
        last = (await store.apply(job_id, end(Event.SUCCEED, result=LONG))).job
        assert last is not None
        assert (last.has_result, last.result) == (not stop, None)
        assert await store.job(job_id) == last
        whole = await store.whole_job(job_id)
        assert whole == replace(last, result=None if stop else LONG)
        return last

    async def work(store: Store) -> None:
        last = await ended(store, stop=False)
        await ended(store, stop=True)
        assert stored_texts(store_url) == 1
        await store.remove_jobs([last.spec.job_id])
        assert stored_texts(store_url) == 0

    with_store(store_url, work)


def test_a_repeated_submit_returns_the_job_with_its_long_config(store_url: str) -> None:
    async def work(store: Store) -> None:
        replay = Replay("key", "hash")
        job, _ = await store.submit(replace(draft(), config=LONG), replay)
        assert await store.submit(replace(draft(), config=LONG), replay) == (job, False)

    with_store(store_url, work)
