"""PostgreSQL only: connections that are lost, also in the middle of a commit."""

from __future__ import annotations

import asyncio

import pytest

from chaos.postgresql_proxy import postgresql_proxy
from cortex.errors import OutcomeUnknown, StorageUnavailable
from cortex.spec.lifecycle import Event
from cortex.spec.tokens import Scope
from cortex.store import Store
from postgresql_server import PostgreSQLServer
from store.recorded_leader import eventually
from store.store_harness import (
    EVENTS,
    KILLS_POSTGRESQL,
    draft,
    end_sessions,
    lock_holder,
    stored_ids,
    through,
    until_it_answers,
    with_store,
)


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_write_whose_commit_loses_the_connection_is_made_once(
    postgresql: PostgreSQLServer, database: str, cut: str
) -> None:
    async def work(store: Store) -> None:
        proxy.cut = cut
        jobs = await asyncio.gather(*(store.submit(draft()) for _ in range(5)))
        assert proxy.has_cut
        assert sorted(await stored_ids(store)) == sorted(job.spec.job_id for job, _ in jobs)
        job_id = jobs[0][0].spec.job_id
        proxy.cut = cut
        assert (await store.apply(job_id, EVENTS[Event.CLAIM])).taken
        proxy.cut = cut
        assert (await store.apply(job_id, EVENTS[Event.STOP])).taken

    with postgresql_proxy(postgresql.folder) as proxy:
        with_store(through(proxy, database), work)


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_write_whose_outcome_is_unknown_waits_and_other_writes_are_refused(
    postgresql: PostgreSQLServer, database: str, cut: str
) -> None:
    async def work(store: Store) -> None:
        proxy.cut, proxy.closes_after_cut = cut, True
        unknown = asyncio.create_task(store.submit(draft()))
        await eventually(lambda: not proxy.is_open)
        for _ in range(5):
            with pytest.raises(StorageUnavailable):
                await store.submit(draft())
            await asyncio.sleep(0.1)
        assert not unknown.done()
        proxy.is_open, proxy.closes_after_cut = True, False
        job, is_new = await unknown
        assert is_new
        await store.ping()
        assert await stored_ids(store) == [job.spec.job_id]

    with postgresql_proxy(postgresql.folder) as proxy:
        with_store(through(proxy, database), work)


def test_closing_the_store_does_not_wait_for_an_unknown_outcome(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def work(store: Store) -> None:
        proxy.cut, proxy.closes_after_cut = "after", True
        unknown = asyncio.create_task(store.submit(draft()))
        await eventually(lambda: not proxy.is_open)
        store.close()
        assert not unknown.done()
        unknown.cancel()

    with postgresql_proxy(postgresql.folder) as proxy:
        with_store(through(proxy, database), work)


def test_a_command_reports_that_the_outcome_is_unknown(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def main() -> None:
        store = Store(through(proxy, database))
        proxy.cut = "after"
        with pytest.raises(OutcomeUnknown, match="check before repeating it"):
            await store.create_token("ci", Scope.READ, "digest")
        assert [token.name for token in await store.tokens()] == ["ci"]
        store.close()

    with postgresql_proxy(postgresql.folder) as proxy:
        asyncio.run(main())


@KILLS_POSTGRESQL
def test_the_store_connects_again_to_a_server_that_was_killed(
    own_postgresql: PostgreSQLServer,
) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for _ in range(2):
            own_postgresql.kill()
            for refused in (store.submit(draft()), store.job(job.spec.job_id), store.ping()):
                with pytest.raises(StorageUnavailable):
                    await refused
            own_postgresql.start()
            await until_it_answers(store)
            assert await stored_ids(store) == [job.spec.job_id]

    with_store(own_postgresql.url(own_postgresql.create()), work)


def test_callers_do_not_notice_that_the_server_ended_all_sessions(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for _ in range(3):
            end_sessions(postgresql, database)
            assert await store.job(job.spec.job_id) == job
            await store.submit(draft())
            end_sessions(postgresql, database)
            await store.submit(draft())
            assert await store.job(job.spec.job_id) == job  # on a connection of the pool
            end_sessions(postgresql, database)
            async with store.deploy_lock:
                pass
        await eventually(lambda: lock_holder(postgresql, database))

    with_store(database, work)
