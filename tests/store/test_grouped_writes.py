"""Writes that the store commits together, and on PostgreSQL sends together."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import Connection, text

from chaos.postgresql_proxy import PostgreSQLProxy, postgresql_proxy
from cortex.errors import NotFound, StorageUnavailable, Superseded
from cortex.spec.lifecycle import Event, State
from cortex.store import InitialClaim, Outcome, Store, events
from postgresql_server import PostgreSQLServer
from store.store_harness import (
    EVENTS,
    draft,
    draft_of_size,
    end,
    spec,
    stored_ids,
    through,
    with_store,
)

_SYNC = b"S\0\0\0\4"
"""The message after which the client waits for the server's answers."""


@asynccontextmanager
async def one_group(
    store: Store, first: Callable[[Connection], object] = lambda _: None
) -> AsyncIterator[None]:
    """Writes that are begun in the block are committed together, after `first`."""
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hold_up(connection: Connection) -> None:
        first(connection)
        has_begun.set()
        assert may_go_on.wait(60)

    holding = asyncio.create_task(store.operators.write_as_leader(hold_up))
    assert await asyncio.to_thread(has_begun.wait, 60)
    try:
        yield
        await asyncio.sleep(0)  # the tasks of the block put their writes into the queue
    finally:
        may_go_on.set()
        await holding


def test_the_events_of_a_group_take_effect_in_their_order(store_url: str) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        job_id = job.spec.job_id
        async with one_group(store):
            group = asyncio.gather(
                store.apply(job_id, events.Claim(0, "h")),
                store.apply(job_id, events.Start(1, job.spec.created_ns + 1)),
                store.apply(job_id, events.Claim(0, "late")),
                store.apply(job_id, end(Event.SUCCEED, end_ns=job.spec.created_ns + 2)),
                store.submit(draft()),
            )
        *outcomes, (other, _) = await group
        assert [outcome.taken for outcome in outcomes] == [True, True, False, True]
        found = await store.job(job_id)
        assert found is not None and found.state is State.SUCCEEDED
        assert found.start_ns == job.spec.created_ns + 1
        assert await stored_ids(store) == [other.spec.job_id, job_id]

    with_store(store_url, work)


def test_a_write_that_fails_fails_no_other_of_its_group(store_url: str) -> None:
    async def work(store: Store) -> None:
        first, _ = await store.submit(draft())
        twice, others = draft(), [draft() for _ in range(3)]
        async with one_group(store):
            group = asyncio.gather(
                *(store.submit(each) for each in (*others[:2], twice, twice, others[2])),
                store.submit(draft("absent")),
                return_exceptions=True,
            )
        *submits, absent = await group
        assert isinstance(absent, NotFound)
        assert len([each for each in submits if isinstance(each, Exception)]) == 1
        ids = {each.job_id for each in (first.spec, twice, *others)}
        assert set(await stored_ids(store)) == ids

    with_store(store_url, work)


def test_the_driver_writes_no_lines_of_its_own_when_a_write_fails(
    postgresql: PostgreSQLServer, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    def end_writer(connection: Connection) -> None:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with postgresql.connected() as other:
            other.execute("SELECT pg_terminate_backend(%s)", (pid,))

    async def work(store: Store) -> None:
        twice = draft()
        async with one_group(store):
            # Many, so that the error arrives while others are sent.
            large = [draft_of_size(30_000) for _ in range(200)]
            group = asyncio.gather(
                *(store.submit(each) for each in (draft(), twice, twice, *large)),
                return_exceptions=True,
            )
        assert len([each for each in await group if isinstance(each, Exception)]) == 1
        with pytest.raises(StorageUnavailable):
            await store.operators.write_as_leader(end_writer)
        await store.submit(draft())

    with_store(database, work)
    assert [each for each in caplog.records if each.name.startswith("psycopg")] == []


@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_writes_that_lose_the_connection_while_they_are_sent_are_made_once(
    postgresql: PostgreSQLServer, database: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    forward = PostgreSQLProxy.forward
    cuts: list[int] = []

    def cut(proxy: PostgreSQLProxy, data: bytes, server: socket.socket) -> bool:
        if cuts or (at := data.find(b"INSERT INTO jobs")) < 0:
            return forward(proxy, data, server)
        cuts.append({"before": 0, "within": at + 4, "after": len(data)}[where])
        server.sendall(data[: cuts[0]])
        return False

    async def work(store: Store) -> None:
        first, _ = await store.submit(draft())
        claimed, _ = await store.submit(draft())
        job_id = claimed.spec.job_id
        async with one_group(store):
            monkeypatch.setattr(PostgreSQLProxy, "forward", cut)
            drafts = [draft() for _ in range(20)]
            group = asyncio.gather(*(store.submit(each) for each in drafts))
            claim = asyncio.create_task(store.apply(job_id, events.Claim(0, "h")))
        assert all(is_new for _, is_new in await group)
        outcome = await claim
        assert outcome.taken and outcome.job is not None and outcome.job.attempt == 1
        ids = [each.job_id for each in (first.spec, claimed.spec, *drafts)]
        assert sorted(await stored_ids(store)) == sorted(ids)
        assert len(cuts) == 1

    with postgresql_proxy(postgresql.folder) as proxy:
        with_store(through(proxy, database), work)


def test_a_submit_gets_the_version_that_is_current_in_its_transaction(store_url: str) -> None:
    async def work(store: Store) -> None:
        earlier, _ = await store.submit(draft())
        assert (await store.submit(draft()))[0].spec.api_id == earlier.spec.api_id
        current = spec()
        async with one_group(store):
            group = asyncio.gather(
                store.submit(draft()),
                store.deploy([current]),
                store.submit(draft()),
                store.submit(draft(), claim=InitialClaim(earlier.spec.api_id, "h")),
                store.submit(draft(), claim=InitialClaim(current.api_id, "h")),
            )
        before, _, after, late, claimed = await group
        assert before[0].spec.api_id == earlier.spec.api_id
        for job, _ in (after, late, claimed):
            assert job.spec.api_id == current.api_id
            found = await store.job(job.spec.job_id)
            assert found is not None and found.spec.api_id == current.api_id
        assert late[0].state is State.WAITING
        assert claimed[0].state is State.STARTING
        await store.undeploy("a", "deleted")
        for claim in (None, InitialClaim(current.api_id, "h")):
            with pytest.raises(NotFound):
                await store.submit(draft(), claim=claim)

    with_store(store_url, work)


def test_a_group_stores_nothing_of_a_term_that_has_ended_and_all_else(database: str) -> None:
    def end_term(connection: Connection) -> None:  # as a new leader does
        connection.execute(text("UPDATE operators SET term = NULL"))

    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        stopped, _ = await store.submit(draft())
        async with one_group(store, end_term):
            group = asyncio.gather(
                store.apply(job.spec.job_id, EVENTS[Event.CLAIM]),
                store.submit(draft()),
                store.submit(draft(), claim=InitialClaim(job.spec.api_id, "h")),
                store.apply(stopped.spec.job_id, EVENTS[Event.STOP]),
                return_exceptions=True,
            )
        claim, submit, claimed, stop = await group
        assert isinstance(claim, Superseded)
        assert isinstance(claimed, Superseded)
        assert isinstance(submit, tuple)
        assert isinstance(stop, Outcome) and stop.taken
        newest = submit[0].spec.job_id
        assert await stored_ids(store) == [newest, stopped.spec.job_id, job.spec.job_id]
        found = await store.job(job.spec.job_id)
        assert found is not None and found.state is State.WAITING and found.attempt == 0

    with_store(database, work)


def test_a_group_costs_a_few_round_trips_however_many_writes_it_has(
    postgresql: PostgreSQLServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = bytearray()
    forward = PostgreSQLProxy.forward

    def recorded(proxy: PostgreSQLProxy, data: bytes, server: socket.socket) -> bool:
        sent.extend(data)
        return forward(proxy, data, server)

    async def work(store: Store) -> None:
        await store.submit(draft())
        monkeypatch.setattr(PostgreSQLProxy, "forward", recorded)
        async with one_group(store):
            group = asyncio.gather(*(store.submit(draft()) for _ in range(200)))
        await group
        assert sent.count(_SYNC) < 20

    with postgresql_proxy(postgresql.folder) as proxy:
        with_store(through(proxy, database), work)
