"""PostgreSQL only: of several operators on a database, one is the leader."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from chaos.postgresql_proxy import postgresql_proxy
from cortex.errors import StartupError, StorageUnavailable, Superseded
from cortex.spec.lifecycle import Event
from cortex.store import InitialClaim, Store
from cortex.store.lock_keys import LEADER_LOCK
from postgresql_server import PostgreSQLServer
from store.recorded_leader import ADDRESS, RecordedLeader, eventually, joined_election
from store.store_harness import (
    EVENTS,
    another_operator,
    draft,
    end,
    lock_holder,
    spec,
    stored_ids,
    through,
    with_store,
)


def test_one_operator_leads_and_another_as_soon_as_it_leaves(database: str) -> None:
    async def main() -> None:
        async with (
            another_operator(database) as (first, one),
            another_operator(database) as (second, two),
            another_operator(database) as (third, three),
        ):
            assert (one.is_leader, two.is_leader, three.is_leader) == (True, False, False)
            assert await first.operators.leader() is None
            assert await second.operators.leader() == await third.operators.leader() == ADDRESS
            await first.operators.leave()
            await eventually(lambda: two.is_leader or three.is_leader)
            assert not one.is_leader
            assert two.is_leader is not three.is_leader

    asyncio.run(main())


def test_a_write_of_the_leader_alone_is_refused_to_the_others(database: str) -> None:
    async def main() -> None:
        async with (
            another_operator(database) as (first, _),
            another_operator(database) as (second, _),
        ):
            await second.deploy([spec()])
            job, _ = await second.submit(draft())
            job_id = job.spec.job_id
            for kind, event in EVENTS.items():
                if kind is not Event.STOP:
                    with pytest.raises(Superseded):
                        await second.apply(job_id, event)
            with pytest.raises(Superseded):
                await second.submit(draft(), claim=InitialClaim(job.spec.api_id, "handle"))
            assert await stored_ids(second) == [job_id]
            assert (await first.apply(job_id, EVENTS[Event.CLAIM])).taken
            assert (await second.apply(job_id, EVENTS[Event.STOP])).taken

    asyncio.run(main())


def test_an_operator_that_cannot_lead_fails_at_its_start_and_another_leads(database: str) -> None:
    async def main() -> None:
        unfit, store = RecordedLeader(), Store(database)
        unfit.lead_error = StartupError("the engine is not there")
        with pytest.raises(StartupError, match="not there"):
            await joined_election(store, unfit)
        async with another_operator(database) as (_, other):
            await eventually(lambda: other.is_leader)
            assert unfit.failures == []  # `join_election` raised it
            await store.operators.leave()
        store.close()

    asyncio.run(main())


def test_an_operator_that_cannot_lead_when_it_is_elected_later_is_notified(database: str) -> None:
    async def main() -> None:
        unfit = RecordedLeader()
        unfit.lead_error = StartupError("the engine is not there")
        async with another_operator(database) as (first, _), another_operator(database, unfit):
            await first.operators.leave()
            await eventually(lambda: unfit.failures)
            async with another_operator(database) as (_, other):
                await eventually(lambda: other.is_leader)

    asyncio.run(main())


def test_an_operator_that_cannot_lead_for_a_moment_tries_again(database: str) -> None:
    async def main() -> None:
        leader = RecordedLeader()
        leader.lead_error = StorageUnavailable("the store does not answer")

        async def recover_later() -> None:
            await asyncio.sleep(0.5)
            leader.lead_error = None

        recovery = asyncio.create_task(recover_later())
        async with another_operator(database, leader):
            await eventually(lambda: leader.is_leader)
        await recovery

    asyncio.run(main())


def test_a_leader_that_loses_its_lock_acquires_it_again_and_its_term_continues(
    postgresql: PostgreSQLServer, database: str
) -> None:
    leader = RecordedLeader()

    async def work(store: Store) -> None:
        before = lock_holder(postgresql, database)
        with postgresql.connected() as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", [before])
        await eventually(lambda: lock_holder(postgresql, database) not in (None, before))
        job, _ = await store.submit(draft())
        assert (await store.apply(job.spec.job_id, EVENTS[Event.CLAIM])).taken
        assert (leader.is_leader, leader.terms) == (True, 1)

    with_store(database, work, leader)


def test_a_leader_whose_lock_another_operator_acquired_stores_nothing_more(
    postgresql: PostgreSQLServer, database: str
) -> None:
    leader = RecordedLeader()

    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        proxy.is_open = False
        with postgresql.connected() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(%s)", [lock_holder(postgresql, database)]
            )
        async with another_operator(database) as (other, other_leader):
            await eventually(lambda: other_leader.is_leader)
            proxy.is_open = True
            assert [each.spec.job_id for each in await other.jobs_in_progress()] == [
                job.spec.job_id
            ]
            for _ in range(2):
                with pytest.raises(Superseded):
                    await store.apply(job.spec.job_id, EVENTS[Event.CLAIM])
            assert await other.job(job.spec.job_id) == job
            await eventually(lambda: not leader.is_leader)
            assert (await other.apply(job.spec.job_id, EVENTS[Event.CLAIM])).taken
            # It works on without leading, and leads again after the other has left.
            second, _ = await store.submit(draft())
            assert sorted(await stored_ids(other)) == sorted([job.spec.job_id, second.spec.job_id])
        await eventually(lambda: leader.is_leader)
        assert leader.terms == 2
        assert leader.failures == []

    with postgresql_proxy(postgresql.folder) as proxy:
        with_store(through(proxy, database), work, leader)


def test_a_leader_that_does_not_renew_its_lease_is_superseded(
    postgresql: PostgreSQLServer, database: str
) -> None:
    """The leader's event loop hangs, its sessions are open, and one has a transaction open."""
    leader = RecordedLeader()

    async def main() -> None:
        async with another_operator(through(proxy, database), leader, lease_s=1) as (hung, _):
            await hung.deploy([spec()])
            job, _ = await hung.submit(draft())
            proxy.is_mute = True  # nothing that it sends arrives
            # A long lease of its own: a busy machine may delay it for more than a second.
            async with another_operator(database) as (other, other_leader):
                await eventually(lambda: other_leader.is_leader)
                claimed = await other.apply(job.spec.job_id, EVENTS[Event.CLAIM])
                assert claimed.taken
                proxy.is_mute = False
                await eventually(lambda: not leader.is_leader)
                with pytest.raises(Superseded):
                    await hung.apply(job.spec.job_id, end(Event.LOSE))
                assert await hung.job(job.spec.job_id) == claimed.job

    with postgresql_proxy(postgresql.folder) as proxy:
        asyncio.run(main())


def test_a_lock_holder_that_never_leads_is_superseded(
    postgresql: PostgreSQLServer, database: str
) -> None:
    """Such as an operator that hangs, or whose machine failed, right after it acquired the lock."""

    async def main() -> None:
        stray = psycopg.connect(database, application_name="cortex stray")
        stray.execute("SELECT pg_advisory_lock(%s)", [LEADER_LOCK])
        async with another_operator(database, lease_s=1) as (_, leader):
            await eventually(lambda: leader.is_leader)
        stray.close()

    asyncio.run(main())
