"""The store on a real SQLite file and a real PostgreSQL: guarded transitions, grouped commits, migrations."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from cortex.errors import Conflict, NotFound, StartupError, StorageUnavailable
from cortex.spec.api import ApiSpec, Definition, Networking
from cortex.spec.job import JobSpec, encode
from cortex.spec.lifecycle import FINAL, SHOWN, TRANSITIONS, Event, State, Status, Wanted
from cortex.spec.times import new_id, now_ns, rfc3339
from cortex.store import Replay, Store, events, lock_keys
from cortex.store.database import connect, migrate
from cortex.store.schema import REVISION, metadata
from store.recorded_leader import RecordedLeader, eventually, joined_election

EVENTS: dict[Event, events.JobEvent] = {
    Event.CLAIM: events.Claim(0, "h"),
    Event.UNCLAIM: events.Unclaim(1),
    Event.START: events.Start(1, 1),
    Event.RETRY: events.Retry(1, "m"),
    Event.STOP: events.Stop(1, "stopped"),
}
PATHS: dict[State, list[events.JobEvent]] = {
    State.WAITING: [],
    State.STARTING: [EVENTS[Event.CLAIM]],
    State.RUNNING: [EVENTS[Event.CLAIM], EVENTS[Event.START]],
}


def end(event: Event, **changes: Any) -> events.End:
    return replace(events.End(event, 1, 1, "m", exit_code=3), **changes)


def spec(name: str = "a", endpoint: str | None = None) -> ApiSpec:
    return ApiSpec(
        name=name,
        definition=Definition(path="a.py"),
        networking=Networking(endpoint=endpoint or name),
        api_id=new_id(),
        project_id="p",
        last_updated=rfc3339(now_ns()),
    )


def draft(name: str = "a") -> JobSpec:
    return JobSpec(job_id=new_id(), api_name=name, api_id="", config="{}", created_ns=now_ns())


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'operator.db'}"
    return str(request.getfixturevalue("empty_database"))


def with_store(
    url: str, work: Callable[[Store], Awaitable[None]], driver: RecordedLeader | None = None
) -> None:
    async def main() -> None:
        store = Store(url)
        try:
            stands = await joined_election(store, driver)
            await eventually(lambda: stands.drives or not store.is_shared)
            await store.deploy([spec()])
            await work(store)
        finally:
            await store.operators.leave()
            store.close()

    asyncio.run(main())


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("state", list(State))
def test_the_store_takes_exactly_the_events_of_the_table(
    url: str, state: State, event: Event
) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for step in path_to(state):
            assert (await store.apply(job.spec.job_id, step)).taken
        before = await store.job(job.spec.job_id)
        assert before is not None and before.state is state
        taken = EVENTS.get(event) or end(event)
        if not isinstance(taken, events.Stop):
            taken = replace(taken, attempt=before.attempt)
        outcome = await store.apply(job.spec.job_id, taken)
        expected = TRANSITIONS.get((state, event))
        assert outcome.taken == (expected is not None)
        assert outcome.job == await store.job(job.spec.job_id)
        if expected is None:
            assert outcome.job == before
        else:
            assert outcome.job is not None and outcome.job.state is expected

    with_store(url, work)


@pytest.mark.parametrize("name", ["deploy_lock", "join_lock"])
def test_a_lock_of_the_store_excludes_however_it_is_reached(url: str, name: str) -> None:
    async def work(store: Store) -> None:
        inside = 0

        async def use() -> None:
            nonlocal inside
            async with getattr(store, name):
                inside += 1
                assert inside == 1
                await asyncio.sleep(0.01)
                inside -= 1

        await asyncio.gather(*(use() for _ in range(5)))
        async with store.deploy_lock, store.join_lock:  # neither excludes the other
            pass

    with_store(url, work)


def test_the_keys_of_advisory_locks_differ_and_stay_the_same_for_all_versions() -> None:
    keys = {name: key for name, key in vars(lock_keys).items() if name.endswith("_LOCK")}
    assert len(set(keys.values())) == len(keys)
    assert keys == {
        "LEADER_LOCK": 0x636F_7274_6578,
        "DEPLOY_LOCK": 0x6_36F7_2746_5780,
        "JOIN_LOCK": 0x6_36F7_2746_5781,
        "MIGRATION_LOCK": 0x63_6F72_7465_7800,
        "WAITING_JOBS_LOCK": 0x636F_7274,
        "WAITING_BYTES_LOCK": 0x636F_7275,
    }


def test_words_that_are_no_text_are_stored_as_escapes(url: str) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for step in PATHS[State.RUNNING]:
            await store.apply(job.spec.job_id, step)
        failed = end(Event.FAIL, message="ValueError: \ud800")
        ended = (await store.apply(job.spec.job_id, failed)).job
        assert ended is not None and ended.message == "ValueError: \\ud800"
        assert await store.job(job.spec.job_id) == ended

    with_store(url, work)


def path_to(state: State) -> list[events.JobEvent]:
    if state in PATHS:
        return PATHS[state]
    if state is State.CANCELLED:
        return [EVENTS[Event.STOP]]
    last = next(e for (s, e), t in TRANSITIONS.items() if t is state and s is State.RUNNING)
    return [*PATHS[State.RUNNING], end(last)]


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING])
@pytest.mark.parametrize(
    "event", [e for (s, e), t in TRANSITIONS.items() if t in FINAL and s is State.RUNNING]
)
def test_an_acknowledged_stop_is_final(url: str, state: State, event: Event) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for step in PATHS[state]:
            await store.apply(job.spec.job_id, step)
        stopped = (await store.apply(job.spec.job_id, EVENTS[Event.STOP])).job
        assert stopped is not None and stopped.wanted is Wanted.STOP
        again = await store.apply(job.spec.job_id, events.Stop(2**62, "x"))
        assert not again.taken
        ended = (await store.apply(job.spec.job_id, end(event, end_ns=2**62))).job
        assert ended is not None
        assert SHOWN[ended.state, ended.wanted] is Status.STOPPED
        shown = ("start_ns", "end_ns", "message", "result")
        assert [getattr(ended, f) for f in shown] == [getattr(stopped, f) for f in shown]

    with_store(url, work)


def test_times_are_ordered_whatever_the_clock_says(url: str) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for step in PATHS[State.RUNNING]:
            await store.apply(job.spec.job_id, step)
        done = (await store.apply(job.spec.job_id, end(Event.SUCCEED, end_ns=5))).job
        assert done is not None and done.start_ns is not None and done.end_ns is not None
        assert job.spec.created_ns <= done.start_ns <= done.end_ns

    with_store(url, work)


def test_an_event_of_an_earlier_attempt_changes_nothing(url: str) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        await store.apply(job.spec.job_id, EVENTS[Event.CLAIM])
        await store.apply(job.spec.job_id, events.Unclaim(1))
        await store.apply(job.spec.job_id, events.Claim(1, "h"))
        late = await store.apply(job.spec.job_id, end(Event.SUCCEED))
        assert not late.taken
        assert late.job is not None and late.job.state is State.STARTING

    with_store(url, work)


def test_an_unknown_job_takes_nothing(url: str) -> None:
    async def work(store: Store) -> None:
        outcome = await store.apply("nothing", EVENTS[Event.STOP])
        assert (outcome.taken, outcome.job) == (False, None)

    with_store(url, work)


def test_a_write_that_fails_takes_no_other_down(url: str) -> None:
    async def work(store: Store) -> None:
        replay = Replay("k", "hash")
        results = await asyncio.gather(
            *(store.submit(draft()) for _ in range(50)),
            store.submit(draft("nothing")),
            store.submit(draft(), replay),
            store.submit(draft(), Replay("k", "other")),
            return_exceptions=True,
        )
        assert [type(r) for r in results if isinstance(r, Exception)] == [NotFound, Conflict]
        assert len((await store.list_jobs("a", limit=100)).jobs) == 51

    with_store(url, work)


def test_undeploy_stops_what_is_in_progress(url: str) -> None:
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

    with_store(url, work)


def test_a_deploy_is_all_or_none(url: str) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(Conflict):
            await store.deploy([spec("b"), spec("c", endpoint="a")])
        assert [d.name for d in await store.deployments()] == ["a"]

    with_store(url, work)


def test_the_migrations_make_the_schema_of_the_code(url: str) -> None:
    engine = connect(url)
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_heads() == (REVISION,)
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused(url: str) -> None:
    Store(url).close()

    def version(number: str) -> str:
        with engine.begin() as connection:
            was = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
            connection.execute(text("UPDATE alembic_version SET version_num = :n"), {"n": number})
        return str(was)

    engine = connect(url)
    ours = version("9999")
    with pytest.raises(StartupError, match="another version"):
        Store(url)
    version(ours)
    engine.dispose()


def test_a_start_loads_no_migrations_where_there_are_none_to_make(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'operator.db'}"
    Store(url).close()
    code = (
        "import sys, cortex.operator.app\n"
        "cortex.operator.app.Store(sys.argv[1]).close()\n"
        "print([name for name in ('alembic', 'httpx') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "operator.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StartupError, match="cannot be used"):
        Store(f"sqlite:///{path}")


def test_a_store_that_takes_no_writes_says_so_and_recovers(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        # SQLite refuses to grow past max_page_count as it does on a full disk: SQLITE_FULL.
        pragma = "PRAGMA max_page_count = {}"
        await store._writer.run(lambda c: c.exec_driver_sql(pragma.format(1)).scalar())
        big = replace(draft(), config=encode({"x": "y" * 1_000_000}))
        with pytest.raises(StorageUnavailable):
            await store.submit(big)
        assert (await store.list_jobs("a", limit=10)).jobs == []
        await store._writer.run(lambda c: c.exec_driver_sql(pragma.format(2**31)).scalar())
        await store.submit(big)

    with_store(f"sqlite:///{tmp_path / 'operator.db'}", work)
