"""What only a store on PostgreSQL has: connections that are lost, another operator, a server's settings."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, event

from chaos.disk import mounted
from chaos.postgresql_proxy import PostgreSQLProxy, postgresql_proxy
from cortex.errors import NotFound, OutcomeUnknown, StartupError, StorageUnavailable, Superseded
from cortex.spec.api import Limits
from cortex.spec.job import JobRecord, encode
from cortex.spec.lifecycle import Event, Wanted
from cortex.spec.tokens import Scope
from cortex.store import InitialClaim, Outcome, Store
from cortex.store.lock_keys import LEADER_LOCK
from postgresql_server import PASSWORD, USER, PostgreSQLServer, server
from store.recorded_leader import ADDRESS, RecordedLeader, eventually, joined_election, sessions
from store.test_jobs import EVENTS, draft, end, spec, with_store

LOCKS = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = %s"


@pytest.fixture(scope="module")
def own() -> Iterator[PostgreSQLServer]:
    """A server that a test may kill or set up anew; it runs again at the test's end."""
    with server() as running:
        yield running


async def stored(store: Store) -> list[str]:
    return [job.spec.job_id for job in (await store.list_jobs("a", limit=1000)).jobs]


async def works_again(store: Store) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                return await store.ping()
            except StorageUnavailable:
                await asyncio.sleep(0.05)


def through(at: PostgreSQLProxy, url: str) -> str:
    return url.partition("?")[0] + f"?host={at.folder}"


# A commit whose answer is lost


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_write_whose_commit_loses_the_connection_is_made_once(
    postgresql: PostgreSQLServer, database: str, cut: str
) -> None:
    async def work(store: Store) -> None:
        between.cut = cut
        jobs = await asyncio.gather(*(store.submit(draft()) for _ in range(5)))
        assert between.has_cut
        assert sorted(await stored(store)) == sorted(job.spec.job_id for job, _ in jobs)
        job_id = jobs[0][0].spec.job_id
        between.cut = cut
        assert (await store.apply(job_id, EVENTS[Event.CLAIM])).taken
        between.cut = cut
        assert (await store.apply(job_id, EVENTS[Event.STOP])).taken

    with postgresql_proxy(postgresql.folder) as between:
        with_store(through(between, database), work)


@pytest.mark.parametrize("cut", ["before", "after"])
def test_while_nobody_can_tell_whether_it_was_made_nothing_is_said(
    postgresql: PostgreSQLServer, database: str, cut: str
) -> None:
    async def work(store: Store) -> None:
        between.cut, between.goes_away = cut, True
        unsure = asyncio.create_task(store.submit(draft()))
        await eventually(lambda: not between.is_open)
        for _ in range(5):
            with pytest.raises(StorageUnavailable):
                await store.submit(draft())
            await asyncio.sleep(0.1)
        assert not unsure.done()
        between.is_open, between.goes_away = True, False
        job, is_new = await unsure
        assert is_new
        await store.ping()
        assert await stored(store) == [job.spec.job_id]

    with postgresql_proxy(postgresql.folder) as between:
        with_store(through(between, database), work)


def test_a_store_that_is_closed_while_nobody_can_tell_does_not_wait(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def work(store: Store) -> None:
        between.cut, between.goes_away = "after", True
        unsure = asyncio.create_task(store.submit(draft()))
        await eventually(lambda: not between.is_open)
        store.close()
        assert not unsure.done()
        unsure.cancel()

    with postgresql_proxy(postgresql.folder) as between:
        with_store(through(between, database), work)


def test_a_command_says_so_when_it_cannot_tell(postgresql: PostgreSQLServer, database: str) -> None:
    async def main() -> None:
        store = Store(through(between, database))
        between.cut = "after"
        with pytest.raises(OutcomeUnknown, match="check before repeating it"):
            await store.create_token("ci", Scope.READ, "digest")
        assert [token.name for token in await store.tokens()] == ["ci"]
        store.close()

    with postgresql_proxy(postgresql.folder) as between:
        asyncio.run(main())


# A server that goes and comes back


def test_connections_that_were_lost_are_made_again(own: PostgreSQLServer) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for _ in range(2):
            own.kill()
            for refused in (store.submit(draft()), store.job(job.spec.job_id), store.ping()):
                with pytest.raises(StorageUnavailable):
                    await refused
            own.start()
            await works_again(store)
            assert await stored(store) == [job.spec.job_id]

    with_store(own.url(own.create()), work)


def test_a_server_that_ends_all_sessions_is_not_noticed(
    postgresql: PostgreSQLServer, database: str
) -> None:
    name = database.partition("?")[0].rpartition("/")[2]
    end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"

    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        for _ in range(3):
            with postgresql.connected() as connection:
                connection.execute(end, [name])
            assert await store.job(job.spec.job_id) == job
            await store.submit(draft())
            with postgresql.connected() as connection:
                connection.execute(end, [name])
            await store.submit(draft())
            assert await store.job(job.spec.job_id) == job  # on a connection that is kept
            with postgresql.connected() as connection:
                connection.execute(end, [name])
            async with store.deploy_lock:
                pass
        await eventually(lambda: lock_of(postgresql, name))

    with_store(database, work)


def test_a_full_disk_of_the_server_stores_nothing_and_recovers(own: PostgreSQLServer) -> None:
    # Not pytest's own folder, which no other user can enter.
    with (
        tempfile.TemporaryDirectory() as folder,
        mounted(Path(folder) / "disk", "size=40m") as disk,
    ):
        Path(folder).chmod(0o755)
        place = disk.folder / "place"
        place.mkdir()
        if os.geteuid() == 0:
            os.chown(place, 65534, 65534)
        with own.connected() as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
        name = own.create(TABLESPACE="small")

        async def work(store: Store) -> None:
            first, _ = await store.submit(draft())
            disk.fill()
            big = replace(draft(), config=encode({"x": os.urandom(1_000_000).hex()}))
            with pytest.raises(StorageUnavailable, match="No space left"):
                await store.submit(big)
            assert await stored(store) == [first.spec.job_id]
            disk.empty()
            await store.submit(big)

        with_store(own.url(name), work)
        own.drop(name)
        with own.connected() as connection:
            connection.execute("DROP TABLESPACE small")


# Who drives


def lock_of(running: PostgreSQLServer, name: str) -> int | None:
    with running.connected() as connection:
        found = connection.execute("SELECT oid FROM pg_database WHERE datname = %s", [name])
        row = connection.execute(LOCKS, found.fetchone()).fetchone()
        return None if row is None else int(row[0])


@asynccontextmanager
async def standing(
    url: str, driver: RecordedLeader | None = None, lease_s: float = 30
) -> AsyncIterator[tuple[Store, RecordedLeader]]:
    """One more operator."""
    store = Store(url)
    try:
        yield store, await joined_election(store, driver, lease_s=lease_s)
    finally:
        await store.operators.leave()
        store.close()


def test_of_several_one_drives_and_the_next_as_soon_as_it_leaves(database: str) -> None:
    async def main() -> None:
        async with (
            standing(database) as (first, one),
            standing(database) as (second, two),
            standing(database) as (third, three),
        ):
            assert (one.drives, two.drives, three.drives) == (True, False, False)
            assert await first.operators.leader() is None
            assert await second.operators.leader() == await third.operators.leader() == ADDRESS
            await first.operators.leave()
            await eventually(lambda: two.drives or three.drives)
            assert not one.drives
            assert two.drives is not three.drives

    asyncio.run(main())


def test_what_is_the_drivers_alone_is_not_stored_for_others(database: str) -> None:
    async def main() -> None:
        async with standing(database) as (first, _), standing(database) as (second, _):
            await second.deploy([spec()])
            job, _ = await second.submit(draft())
            job_id = job.spec.job_id
            for kind, event in EVENTS.items():
                if kind is not Event.STOP:
                    with pytest.raises(Superseded):
                        await second.apply(job_id, event)
            with pytest.raises(Superseded):
                await second.submit(draft(), claim=InitialClaim(job.spec.api_id, "handle"))
            assert await stored(second) == [job_id]
            assert (await first.apply(job_id, EVENTS[Event.CLAIM])).taken
            assert (await second.apply(job_id, EVENTS[Event.STOP])).taken

    asyncio.run(main())


def test_a_database_belongs_with_one_data_folder(database: str) -> None:
    for place, is_right in (("here", True), ("there", False), ("here", True)):
        store = Store(database)
        if is_right:
            store.operators.join(place, "this machine", ADDRESS)
        else:
            with pytest.raises(StartupError, match="belongs to another data folder"):
                store.operators.join(place, "this machine", ADDRESS)
        store.close()


def test_an_operator_of_a_folder_that_was_given_up_for_lost_stores_nothing_when_it_is_back(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def main() -> None:
        away = Store(through(between, database))
        driver = await joined_election(away)
        await away.deploy([spec()])
        job, _ = await away.submit(draft())
        between.shut()  # it is cut off, and its machine taken to be gone
        await eventually(lambda: not sessions(database))
        store = Store(database)
        store.operators.join("there", "another machine", ADDRESS, instead_of="here")
        between.open()
        await eventually(lambda: not driver.drives)
        with pytest.raises(Superseded, match="was declared lost"):
            await away.submit(draft())
        with pytest.raises(Superseded, match="was declared lost"):
            await away.apply(job.spec.job_id, EVENTS[Event.STOP])
        assert await stored(store) == [job.spec.job_id]
        assert store.operators.data_folder_ids() == {"there"}
        await away.operators.leave()
        away.close()
        await store.submit(draft())
        store.close()

    with postgresql_proxy(postgresql.folder) as between:
        asyncio.run(main())


def test_operators_that_are_there_at_one_time_run_jobs_in_one_place(database: str) -> None:
    first, second = Store(database), Store(database)
    first.operators.join("here", "one machine", ADDRESS)
    with pytest.raises(StartupError, match=f"operator at {ADDRESS} .* on another engine"):
        second.operators.join("here", "another", ADDRESS)
    first.close()
    second.close()
    asyncio.run(eventually(lambda: not sessions(database)))
    second = Store(database)
    second.operators.join("here", "another", ADDRESS)
    second.close()


def test_an_operator_that_never_can_drive_says_so_and_another_does(database: str) -> None:
    async def main() -> None:
        unfit, store = RecordedLeader(), Store(database)
        unfit.refuses = StartupError("the engine is not there")
        with pytest.raises(StartupError, match="not there"):
            await joined_election(store, unfit)
        async with standing(database) as (_, other):
            await eventually(lambda: other.drives)
            assert unfit.failures == []  # its start told it
            await store.operators.leave()
        store.close()

    asyncio.run(main())


def test_an_operator_that_finds_later_that_it_cannot_drive_is_told(database: str) -> None:
    async def main() -> None:
        unfit = RecordedLeader()
        unfit.refuses = StartupError("the engine is not there")
        async with standing(database) as (first, _), standing(database, unfit):
            await first.operators.leave()
            await eventually(lambda: unfit.failures)
            async with standing(database) as (_, other):
                await eventually(lambda: other.drives)

    asyncio.run(main())


def test_an_operator_that_cannot_drive_now_stands_again(database: str) -> None:
    async def main() -> None:
        driver = RecordedLeader()
        driver.refuses = StorageUnavailable("the store does not answer")

        async def later() -> None:
            await asyncio.sleep(0.5)
            driver.refuses = None

        healing = asyncio.create_task(later())
        async with standing(database, driver):
            await eventually(lambda: driver.drives)
        await healing

    asyncio.run(main())


def test_a_lock_that_is_lost_is_taken_again_and_the_term_goes_on(
    postgresql: PostgreSQLServer, database: str
) -> None:
    name = database.partition("?")[0].rpartition("/")[2]
    driver = RecordedLeader()

    async def work(store: Store) -> None:
        before = lock_of(postgresql, name)
        with postgresql.connected() as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", [before])
        await eventually(lambda: lock_of(postgresql, name) not in (None, before))
        job, _ = await store.submit(draft())
        assert (await store.apply(job.spec.job_id, EVENTS[Event.CLAIM])).taken
        assert (driver.drives, driver.terms) == (True, 1)

    with_store(database, work, driver)


def test_an_operator_whose_lock_somebody_else_took_stores_nothing_more(
    postgresql: PostgreSQLServer, database: str
) -> None:
    name = database.partition("?")[0].rpartition("/")[2]
    driver = RecordedLeader()

    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        between.is_open = False
        with postgresql.connected() as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", [lock_of(postgresql, name)])
        async with standing(database) as (other, taker):
            await eventually(lambda: taker.drives)
            between.is_open = True
            assert [each.spec.job_id for each in await other.jobs_in_progress()] == [
                job.spec.job_id
            ]
            for _ in range(2):
                with pytest.raises(Superseded):
                    await store.apply(job.spec.job_id, EVENTS[Event.CLAIM])
            assert await other.job(job.spec.job_id) == job
            await eventually(lambda: not driver.drives)
            assert (await other.apply(job.spec.job_id, EVENTS[Event.CLAIM])).taken
            # It goes on as one that does not drive, and drives again when it is its turn.
            second, _ = await store.submit(draft())
            assert sorted(await stored(other)) == sorted([job.spec.job_id, second.spec.job_id])
        await eventually(lambda: driver.drives)
        assert driver.terms == 2
        assert driver.failures == []

    with postgresql_proxy(postgresql.folder) as between:
        with_store(through(between, database), work, driver)


def test_an_operator_that_does_not_renew_its_lease_is_superseded(
    postgresql: PostgreSQLServer, database: str
) -> None:
    """Its loop hangs, its sessions are there, and a transaction of its is under way."""
    driver = RecordedLeader()

    async def main() -> None:
        async with standing(through(between, database), driver, lease_s=1) as (hung, _):
            await hung.deploy([spec()])
            job, _ = await hung.submit(draft())
            between.is_mute = True  # whatever it sends does not get there
            # Its own lease is long: a busy machine may hold it up for more than a second, too.
            async with standing(database) as (other, taker):
                await eventually(lambda: taker.drives)
                claimed = await other.apply(job.spec.job_id, EVENTS[Event.CLAIM])
                assert claimed.taken
                between.is_mute = False
                await eventually(lambda: not driver.drives)
                with pytest.raises(Superseded):
                    await hung.apply(job.spec.job_id, end(Event.LOSE))
                assert await hung.job(job.spec.job_id) == claimed.job

    with postgresql_proxy(postgresql.folder) as between:
        asyncio.run(main())


def test_one_that_holds_the_lock_and_never_drives_is_put_out(
    postgresql: PostgreSQLServer, database: str
) -> None:
    """As one that hangs, or whose machine vanished, right after it got the lock."""

    async def main() -> None:
        stray = psycopg.connect(database, application_name="cortex stray")
        stray.execute("SELECT pg_advisory_lock(%s)", [LEADER_LOCK])
        async with standing(database, lease_s=1) as (_, driver):
            await eventually(lambda: driver.drives)
        stray.close()

    asyncio.run(main())


# What is told


class Told:
    """A `store.ChangeListener`."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, bool]] = []
        self.apis = 0
        self.terms = 0
        self.anything = 0

    def on_job_changed(self, job_id: str, *, own: bool) -> None:
        self.jobs.append((job_id, own))

    def on_apis_changed(self) -> None:
        self.apis += 1

    def on_leader_changed(self) -> None:
        self.terms += 1

    def on_all_may_have_changed(self) -> None:
        self.anything += 1


def test_every_change_is_told_to_all_as_it_is_committed(database: str) -> None:
    async def main() -> None:
        told = Told()
        first = Store(database)
        await first.operators.subscribe(told)
        assert told.anything == 1
        await joined_election(first)
        await eventually(lambda: told.terms == 1)
        async with standing(database) as (second, _):
            await second.deploy([spec()])
            await eventually(lambda: told.apis == 1)
            job, _ = await second.submit(draft())
            job_id = job.spec.job_id
            await first.apply(job_id, EVENTS[Event.CLAIM])
            await second.apply(job_id, EVENTS[Event.STOP])
            await first.apply(job_id, end(Event.LOSE))
            await eventually(lambda: len(told.jobs) == 4)
            assert told.jobs == [(job_id, own) for own in (False, True, False, True)]
            await second.undeploy("a", "deleted")
            await eventually(lambda: told.apis == 2)
            await first.note_removed_folders([job_id])
            await first.remove_jobs([job_id])
            await first.ping()
            assert len(told.jobs) == 4
        await first.operators.leave()
        first.close()

    asyncio.run(main())


def test_whoever_could_not_hear_looks_at_everything(
    postgresql: PostgreSQLServer, database: str
) -> None:
    name = database.partition("?")[0].rpartition("/")[2]
    end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"

    async def main() -> None:
        told = Told()
        store = Store(database)
        await store.operators.subscribe(told)
        with postgresql.connected() as connection:
            connection.execute(end, [name])
        await eventually(lambda: told.anything == 2)
        async with standing(database) as (other, _):
            await other.deploy([spec()])
            await eventually(lambda: told.apis == 1)
        await store.operators.leave()
        store.close()

    asyncio.run(main())


# The lock for deploys


def test_one_at_a_time_changes_which_versions_there_are(database: str) -> None:
    async def main() -> None:
        first, second = Store(database), Store(database)
        here, there = first.deploy_lock, second.deploy_lock
        async with here:
            waiting = asyncio.create_task(there.__aenter__())
            await asyncio.sleep(0.2)
            assert not waiting.done()
        await waiting
        await there.__aexit__()
        async with here:  # a waiter that is cancelled does not get it later
            waiting = asyncio.create_task(there.__aenter__())
            await asyncio.sleep(0.2)
            waiting.cancel()
        async with asyncio.timeout(30), there:
            pass
        first.close()
        second.close()

    asyncio.run(main())


def test_the_lock_is_not_acquired_while_the_server_is_down(own: PostgreSQLServer) -> None:
    async def main() -> None:
        store = Store(own.url(own.create()))
        lock = store.deploy_lock
        own.kill()
        with pytest.raises(StorageUnavailable):
            async with lock:
                pytest.fail("the lock was acquired")
        own.start()
        async with lock:
            own.kill()  # what was done with it is done
        own.start()
        async with lock:
            pass
        store.close()

    asyncio.run(main())


# Operators that write at the same time


def test_a_job_of_an_api_that_is_deleted_meanwhile_is_refused_or_stopped(database: str) -> None:
    async def main() -> None:
        async with standing(database) as (first, _), standing(database) as (second, _):
            for _ in range(5):
                await first.deploy([spec()])
                drafts = [draft() for _ in range(40)]
                work: list[Awaitable[object]] = [second.submit(each) for each in drafts]
                work.insert(20, first.undeploy("a", "deleted"))
                done = await asyncio.gather(*work, return_exceptions=True)
                refused = [each for each in done if isinstance(each, BaseException)]
                assert all(isinstance(each, NotFound) for each in refused)
                assert await first.jobs_in_progress() == []

    asyncio.run(main())


def test_a_job_of_an_api_that_is_replaced_meanwhile_is_taken(database: str) -> None:
    async def main() -> None:
        async with standing(database) as (first, _), standing(database) as (second, _):
            await first.deploy([spec()])
            work: list[Awaitable[object]] = [second.submit(draft()) for _ in range(40)]
            for place in range(0, 50, 10):
                work.insert(place, first.deploy([spec()]))
            await asyncio.gather(*work)

    asyncio.run(main())


def test_writes_that_are_in_each_others_way_are_made(database: str) -> None:
    """Two transactions that want what the other one has: the server ends one of them."""

    async def main() -> None:
        async with standing(database) as (first, _), standing(database) as (second, _):
            await first.deploy([spec()])
            jobs = [(await first.submit(draft()))[0].spec.job_id for _ in range(30)]
            work: list[Awaitable[Outcome]] = []
            for one, other in zip(jobs, reversed(jobs), strict=True):
                work.append(first.apply(one, EVENTS[Event.CLAIM]))
                work.append(second.apply(other, EVENTS[Event.STOP]))
            await asyncio.gather(*work)
            found = await first.jobs(jobs)
            assert {job.wanted for job in found} == {Wanted.STOP}

    asyncio.run(main())


def test_operators_that_start_at_once_migrate_one_after_another(
    postgresql: PostgreSQLServer,
) -> None:
    name = postgresql.create()
    with ThreadPoolExecutor(4) as pool:
        for store in pool.map(lambda _: Store(postgresql.url(name)), range(4)):
            store.close()
    postgresql.drop(name)


# What the server has to be


def refusal(url: str) -> str:
    with pytest.raises(StartupError) as error:
        Store(url).close()
    assert PASSWORD not in error.value.message
    assert "%3A" not in error.value.message
    return error.value.message


def test_a_database_that_cannot_be_reached_is_told(
    postgresql: PostgreSQLServer, database: str
) -> None:
    assert "password authentication failed" in refusal(database.replace("%3A", "x"))
    assert '"nothing" does not exist' in refusal(postgresql.url("nothing"))
    assert "No such file" in refusal(f"postgresql://{USER}:x@/a?host=/nowhere")
    assert "refused" in refusal(f"postgres://{USER}:x@127.0.0.1:1/a")
    assert "***@127.0.0.1:1/a" in refusal(f"postgres://{USER}:x@127.0.0.1:1/a")
    told = refusal(f"postgresql://{USER}@127.0.0.1:1/a?password=secret")
    assert f"{USER}:***@127.0.0.1:1/a " in told
    assert "secret" not in told


def test_a_database_that_is_somebody_elses_is_told(postgresql: PostgreSQLServer) -> None:
    name = postgresql.create(OWNER="postgres")
    assert "permission denied" in refusal(postgresql.url(name))
    postgresql.drop(name)


def test_a_database_of_another_encoding_is_told(postgresql: PostgreSQLServer) -> None:
    name = postgresql.create(template="template0", ENCODING="'SQL_ASCII'", LOCALE="'C'")
    assert "--encoding=UTF8" in refusal(postgresql.url(name))
    postgresql.drop(name)


def test_a_server_without_fsync_is_refused(own: PostgreSQLServer) -> None:
    url = own.url(own.create())
    own.stop()
    own.settings["fsync"] = "off"
    own.start()
    assert "ALTER SYSTEM SET fsync = on" in refusal(url)
    own.stop()
    del own.settings["fsync"]
    own.start()


def test_a_standby_is_refused_and_one_that_has_become_one_takes_no_writes(
    own: PostgreSQLServer,
) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        own.stop()
        (own.data / "standby.signal").touch()
        own.start()
        with pytest.raises(StorageUnavailable):
            await store.submit(draft())
        assert await store.job(job.spec.job_id) == job
        assert "standby" in refusal(url)
        own.stop()
        (own.data / "standby.signal").unlink()
        own.start()
        await works_again(store)

    url = own.url(own.create())
    with_store(url, work)


@pytest.mark.parametrize(
    ("set_to", "is_then"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("remote_apply", "remote_apply")],
)
def test_a_commit_waits_for_the_disk_whatever_the_server_says(
    postgresql: PostgreSQLServer, database: str, set_to: str, is_then: str
) -> None:
    name = database.partition("?")[0].rpartition("/")[2]
    with postgresql.connected() as connection:
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = {set_to}")

    async def work(store: Store) -> None:
        def setting(connection: Connection) -> str:
            return str(connection.exec_driver_sql("SHOW synchronous_commit").scalar_one())

        assert await store._writer.run(setting) == is_then

    with_store(database, work)


# What is stored


def test_text_that_postgresql_cannot_hold_is_stored_without_it(empty_database: str) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(replace(draft(), config=encode({"x": "a\0b"})))
        await store.apply(job.spec.job_id, EVENTS[Event.CLAIM])
        succeeded = end(Event.SUCCEED, message="a\0b", result='"a\\u0000b"')
        ended = (await store.apply(job.spec.job_id, succeeded)).job
        assert ended is not None
        assert (ended.message, ended.result) == ("a\ufffdb", '"a\\u0000b"')
        assert ended.spec.config == encode({"x": "a\0b"})
        assert await store.job("\0") is None

    with_store(empty_database, work)


def test_jobs_are_numbered_in_the_order_of_their_submits(empty_database: str) -> None:
    async def work(store: Store) -> None:
        drafts = [draft("nothing" if number % 7 == 3 else "a") for number in range(100)]
        results = await asyncio.gather(*map(store.submit, drafts), return_exceptions=True)
        taken = [result[0] for result in results if not isinstance(result, BaseException)]
        assert all(isinstance(job, JobRecord) for job in taken)
        assert [job.seq for job in taken] == sorted({job.seq for job in taken})
        assert [d.job_id for d in drafts if d.api_name == "a"] == [j.spec.job_id for j in taken]

    with_store(empty_database, work)


def test_the_planner_uses_the_partial_indexes(database: str) -> None:
    """With many finished jobs, none of what is asked again and again looks through them."""
    copies = (
        "INSERT INTO jobs (job_id, api_name, api_id, spec, created_ns, state, wanted, attempt, end_ns) "
        "SELECT job_id || n, api_name, api_id, spec, created_ns, 'failed', 'run', 1, n "
        "FROM jobs, generate_series(1, 20000) n"
    )

    async def work(store: Store) -> None:
        await store.deploy([spec().model_copy(update={"limits": Limits(max_waiting=5)})])
        await store.submit(draft())
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(copies)
            connection.execute("ANALYZE")
        asked: list[tuple[str, Any]] = []

        def listen(*call: Any) -> None:
            asked.append((call[2], call[3]))

        event.listen(store._engine, "before_cursor_execute", listen)
        await store.submit(draft())
        await store.jobs_in_progress()
        await store.jobs_with_folder(100, 10)
        await store.jobs_ended(100, 10)
        await store.list_jobs("a", limit=10)
        await store.undeploy("a", "deleted")
        event.remove(store._engine, "before_cursor_execute", listen)
        plans = []
        with psycopg.connect(database) as connection:
            for statement, values in asked:
                if statement.startswith(("SELECT", "UPDATE")):
                    rows = connection.execute(f"EXPLAIN {statement}", values)
                    plans.append("\n".join(line for (line,) in rows.fetchall()))
        plan = "\n\n".join(plans)
        assert len(plans) > 8
        assert "Seq Scan on jobs" not in plan, plan
        for index in ("jobs_in_progress", "jobs_finished", "jobs_waiting"):
            assert index in plan, plan

    with_store(database, work)
