"""What the store keeps of long configs and results, and how much may wait, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, insert, select, text

import cortex.store
from cortex.errors import OverWaitingBytes
from cortex.spec.api import Limits
from cortex.spec.job import JobRecord, JobSpec, encode
from cortex.spec.lifecycle import Event
from cortex.store import InitialClaim, Store, events
from cortex.store.schema import jobs, long_texts
from store.recorded_leader import eventually, joined_election
from store.test_jobs import EVENTS, draft, end, spec, with_store

LONG = encode({"text": "ä" * 5000})


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'operator.db'}"
    return str(request.getfixturevalue("empty_database"))


def long(size: int = 5000) -> JobSpec:
    return replace(draft(), config=encode({"x": "y" * (size - 8)}))


async def submitted(store: Store, job: JobSpec) -> None:
    """What was full is looked at again after a moment."""
    async with asyncio.timeout(60):
        while True:
            with suppress(OverWaitingBytes):
                await store.submit(job)
                return
            await asyncio.sleep(0.01)


async def texts(store: Store) -> int:
    return await store._read(lambda c: len(c.execute(select(long_texts.c.seq)).all()))


def test_a_long_config_is_told_where_a_job_is_claimed_or_asked_for_whole(url: str) -> None:
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

    with_store(url, work)


def test_a_long_result_is_there_unless_the_job_was_stopped(url: str) -> None:
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
        assert await texts(store) == 1
        await store.remove_jobs([last.spec.job_id])
        assert await texts(store) == 0

    with_store(url, work)


def test_a_repeated_submit_is_answered_with_its_long_config(url: str) -> None:
    async def work(store: Store) -> None:
        replay = cortex.store.Replay("key", "hash")
        job, _ = await store.submit(replace(draft(), config=LONG), replay)
        assert await store.submit(replace(draft(), config=LONG), replay) == (job, False)

    with_store(url, work)


def test_no_more_bytes_wait_than_may(url: str) -> None:
    async def work(_other: Store) -> None:
        store = Store(url, 10_000)
        stands = await joined_election(store)
        try:
            await eventually(lambda: stands.drives or not store.is_shared)
            first, _ = await store.submit(long(6000))
            with pytest.raises(OverWaitingBytes, match=r"6000 bytes .* 5000 more .* 10000 "):
                await store.submit(long(5000))
            for _ in range(2):
                await store.submit(long(2000))
            with pytest.raises(OverWaitingBytes):
                await store.submit(draft())
            taken = await store.apply(first.spec.job_id, EVENTS[Event.CLAIM])
            assert taken.taken
            await submitted(store, long(3000))
            # What waits again counts; one that is claimed at once does not.
            assert (await store.apply(first.spec.job_id, events.Unclaim(1))).taken
            with pytest.raises(OverWaitingBytes):
                await store.submit(draft())
            api_id = first.spec.api_id
            assert (await store.submit(long(9000), claim=InitialClaim(api_id, "h")))[1]
        finally:
            await store.operators.leave()
            store.close()

    # The one that deploys gives up to drive for the other.
    async def deployed(store: Store) -> None:
        await store.operators.leave()
        await work(store)

    with_store(url, deployed)


def test_of_several_operators_no_more_bytes_wait_than_may(empty_database: str) -> None:
    async def work(first: Store) -> None:
        others = [Store(empty_database, 1_000_000) for _ in range(3)]
        try:
            submits = [store.submit(long(100_000)) for _ in range(5) for store in others]
            told = await asyncio.gather(*submits, return_exceptions=True)
            refused = [error for error in told if isinstance(error, OverWaitingBytes)]
            assert (len(told), len(refused)) == (15, 5)
            # Small ones are added up now and then, by each operator.
            small = [store.submit(long(5000)) for _ in range(40) for store in others]
            await asyncio.gather(*small, return_exceptions=True)
            waiting = await first._read(
                lambda c: c.execute(text("SELECT sum(config_bytes) FROM jobs")).scalar_one()
            )
            assert 1_000_000 <= waiting <= 1_000_000 * (1 + 3 / 16)
        finally:
            for store in others:
                store.close()

    with_store(empty_database, work)


def test_an_api_s_own_limit_holds_beside(url: str) -> None:
    async def work(store: Store) -> None:
        await store.deploy([spec("b").model_copy(update={"limits": Limits(max_waiting=1)})])
        await store.submit(draft("b"))
        with pytest.raises(cortex.errors.OverLimit) as caught:
            await store.submit(draft("b"))
        assert caught.value.kind == "limit.max_waiting"

    with_store(url, work)


def test_rows_of_before_are_read_and_count(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'operator.db'}"
    engine = create_engine(url)
    config = Config()
    folder = Path(cortex.store.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0006")
        version = spec()
        connection.execute(
            text("INSERT INTO versions VALUES (:api_id, 'a', :spec, 1)"),
            {"api_id": version.api_id, "spec": version.model_dump_json()},
        )
        connection.execute(text("INSERT INTO apis VALUES ('a', 'a', :id)"), {"id": version.api_id})
        old = {
            "job_id": "1a", "api_name": "a", "api_id": version.api_id, "created_ns": 1,
            "config": json.loads(LONG), "timeout": None, "kind": "TaskAPI", "workers": 1,
        }  # fmt: skip
        row = {
            "job_id": "1a", "api_name": "a", "api_id": version.api_id, "created_ns": 1,
            "spec": json.dumps(old), "state": "waiting", "wanted": "run", "attempt": 0,
        }  # fmt: skip
        connection.execute(insert(jobs), row)
        done = {**row, "job_id": "1b", "state": "succeeded", "result": LONG}
        connection.execute(insert(jobs), {**done, "spec": json.dumps({**old, "job_id": "1b"})})
    engine.dispose()

    async def work() -> None:
        store = Store(url, 40_000)
        try:
            waits, ended = await store.job("1a"), await store.job("1b")
            assert waits is not None
            assert ended is not None
            assert (waits.spec.config, ended.has_result, ended.result) == (None, True, None)
            whole = await store.whole_job("1b")
            assert whole is not None
            assert (whole.spec.config, whole.result) == (LONG, LONG)
            with pytest.raises(OverWaitingBytes):
                await store.submit(long(20_000))
            claimed = (await store.apply("1a", EVENTS[Event.CLAIM], waits.spec)).job
            assert claimed is not None
            assert claimed.spec.config == LONG
            await submitted(store, long(20_000))
        finally:
            store.close()

    asyncio.run(work())
