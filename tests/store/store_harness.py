"""Helpers of the store's tests: small APIs, jobs and events, and stores whose operator leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from chaos.postgresql_proxy import PostgreSQLProxy
from cortex.errors import OverWaitingBytes, StorageUnavailable
from cortex.spec.api import ApiSpec, Definition, Networking
from cortex.spec.job import JobRecord, JobSpec, encode
from cortex.spec.lifecycle import TRANSITIONS, Event, State
from cortex.spec.times import new_id, now_ns, rfc3339
from cortex.store import Store, events
from postgresql_server import PostgreSQLServer
from store.recorded_leader import RecordedLeader, eventually, joined_election

KILLS_POSTGRESQL = pytest.mark.xdist_group("killed_postgresql")
"""For tests of `own_postgresql`: one test process runs them all, so that one server is started."""

EVENTS: dict[Event, events.JobEvent] = {
    Event.CLAIM: events.Claim(0, "h"),
    Event.UNCLAIM: events.Unclaim(1),
    Event.START: events.Start(1, 1),
    Event.RETRY: events.Retry(1, "m"),
    Event.STOP: events.Stop(1, "stopped"),
}
"""An event of each kind but the ends: of a job's first attempt."""

_EVENTS_TO: dict[State, list[events.JobEvent]] = {
    State.WAITING: [],
    State.STARTING: [EVENTS[Event.CLAIM]],
    State.RUNNING: [EVENTS[Event.CLAIM], EVENTS[Event.START]],
    State.CANCELLED: [EVENTS[Event.STOP]],
}
_HOLDERS = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = %s"
_END_SESSIONS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"


def spec(name: str = "a", endpoint: str | None = None) -> ApiSpec:
    """A new version of an API."""
    return ApiSpec(
        name=name,
        definition=Definition(path="a.py"),
        networking=Networking(endpoint=endpoint or name),
        api_id=new_id(),
        project_id="p",
        last_updated=rfc3339(now_ns()),
    )


def draft(name: str = "a") -> JobSpec:
    """A job of an API, for `Store.submit`."""
    return JobSpec(job_id=new_id(), api_name=name, api_id="", config="{}", created_ns=now_ns())


def end(event: Event, **changes: Any) -> events.End:
    """An end of a job's first attempt."""
    return replace(events.End(event, 1, 1, "m", exit_code=3), **changes)


def events_to(state: State) -> list[events.JobEvent]:
    """The events that bring a new job into a state."""
    if state in _EVENTS_TO:
        return _EVENTS_TO[state]
    last = next(e for (s, e), t in TRANSITIONS.items() if t is state and s is State.RUNNING)
    return [*_EVENTS_TO[State.RUNNING], end(last)]


async def job_in(store: Store, state: State) -> JobRecord:
    """A new job of the API `a` in a state."""
    job, _ = await store.submit(draft())
    for event in events_to(state):
        outcome = await store.apply(job.spec.job_id, event)
        assert outcome.taken and outcome.job is not None
        job = outcome.job
    return job


def draft_of_size(size: int) -> JobSpec:
    """A job with a config of so many bytes."""
    return replace(draft(), config=encode({"x": "y" * (size - 8)}))


async def submit_when_free(store: Store, job: JobSpec) -> None:
    """Submit a job that fits in the limit: the store reuses the last sum for a moment."""
    async with asyncio.timeout(60):
        while True:
            with suppress(OverWaitingBytes):
                await store.submit(job)
                return
            await asyncio.sleep(0.01)


async def stored_ids(store: Store) -> list[str]:
    """The ids of the jobs of the API `a`."""
    return [job.spec.job_id for job in (await store.list_jobs("a", limit=1000)).jobs]


def with_store(
    url: str, work: Callable[[Store], Awaitable[None]], leader: RecordedLeader | None = None
) -> None:
    """Run `work` with the store of a leader, on which the API `a` is deployed."""

    async def main() -> None:
        async with another_operator(url, leader) as (store, callbacks):
            await eventually(lambda: callbacks.is_leader)
            await store.deploy([spec()])
            await work(store)

    asyncio.run(main())


@asynccontextmanager
async def another_operator(
    url: str, leader: RecordedLeader | None = None, lease_s: float = 30
) -> AsyncIterator[tuple[Store, RecordedLeader]]:
    """The store of one more operator, which takes part in the election of the leader."""
    store = Store(url)
    try:
        yield store, await joined_election(store, leader, lease_s=lease_s)
    finally:
        await store.operators.leave()
        store.close()


async def until_it_answers(store: Store) -> None:
    """Wait until the database accepts writes."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await store.ping()
            except StorageUnavailable:
                await asyncio.sleep(0.05)


def through(proxy: PostgreSQLProxy, url: str) -> str:
    """The URL of the same database, through a proxy."""
    return url.partition("?")[0] + f"?host={proxy.folder}"


def database_name(url: str) -> str:
    """The name of the database at a URL of PostgreSQL."""
    return url.partition("?")[0].rpartition("/")[2]


def end_sessions(postgresql: PostgreSQLServer, url: str) -> None:
    """Let the server end all sessions of a database."""
    with postgresql.connected() as connection:
        connection.execute(_END_SESSIONS, [database_name(url)])


def lock_holder(postgresql: PostgreSQLServer, url: str) -> int | None:
    """The process of the server's session that holds an advisory lock of a database, or None."""
    with postgresql.connected() as connection:
        found = connection.execute(
            "SELECT oid FROM pg_database WHERE datname = %s", [database_name(url)]
        )
        row = connection.execute(_HOLDERS, found.fetchone()).fetchone()
        return None if row is None else int(row[0])
