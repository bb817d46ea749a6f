"""PostgreSQL only: the servers that the store refuses, what a commit waits for, and query plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, event

from cortex.errors import StartupError, StorageUnavailable
from cortex.spec.api import Limits
from cortex.spec.job import encode
from cortex.spec.lifecycle import Event
from cortex.store import Store
from postgresql_server import PASSWORD, USER, PostgreSQLServer
from store.store_harness import (
    EVENTS,
    KILLS_POSTGRESQL,
    database_name,
    draft,
    end,
    spec,
    until_it_answers,
    with_store,
)


def refusal(url: str) -> str:
    """The message of the refused start, which contains no password."""
    with pytest.raises(StartupError) as error:
        Store(url).close()
    assert PASSWORD not in error.value.message
    assert "%3A" not in error.value.message
    return error.value.message


def test_the_refusal_says_why_the_database_cannot_be_reached(
    postgresql: PostgreSQLServer, database: str
) -> None:
    assert "password authentication failed" in refusal(database.replace("%3A", "x"))
    assert '"nothing" does not exist' in refusal(postgresql.url("nothing"))
    assert "No such file" in refusal(f"postgresql://{USER}:x@/a?host=/nowhere")
    assert "refused" in refusal(f"postgres://{USER}:x@127.0.0.1:1/a")
    assert "***@127.0.0.1:1/a" in refusal(f"postgres://{USER}:x@127.0.0.1:1/a")
    message = refusal(f"postgresql://{USER}@127.0.0.1:1/a?password=secret")
    assert f"{USER}:***@127.0.0.1:1/a " in message
    assert "secret" not in message


def test_a_database_of_another_owner_is_refused(postgresql: PostgreSQLServer) -> None:
    name = postgresql.create(OWNER="postgres")
    assert "permission denied" in refusal(postgresql.url(name))
    postgresql.drop(name)


def test_a_database_of_another_encoding_is_refused(postgresql: PostgreSQLServer) -> None:
    name = postgresql.create(template="template0", ENCODING="'SQL_ASCII'", LOCALE="'C'")
    assert "--encoding=UTF8" in refusal(postgresql.url(name))
    postgresql.drop(name)


@KILLS_POSTGRESQL
def test_a_server_without_fsync_is_refused(own_postgresql: PostgreSQLServer) -> None:
    url = own_postgresql.url(own_postgresql.create())
    own_postgresql.stop()
    own_postgresql.settings["fsync"] = "off"
    own_postgresql.start()
    assert "ALTER SYSTEM SET fsync = on" in refusal(url)
    own_postgresql.stop()
    del own_postgresql.settings["fsync"]
    own_postgresql.start()


@KILLS_POSTGRESQL
def test_a_standby_is_refused_and_a_server_that_became_one_accepts_no_writes(
    own_postgresql: PostgreSQLServer,
) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        own_postgresql.stop()
        (own_postgresql.data / "standby.signal").touch()
        own_postgresql.start()
        with pytest.raises(StorageUnavailable):
            await store.submit(draft())
        assert await store.job(job.spec.job_id) == job
        assert "standby" in refusal(url)
        own_postgresql.stop()
        (own_postgresql.data / "standby.signal").unlink()
        own_postgresql.start()
        await until_it_answers(store)

    url = own_postgresql.url(own_postgresql.create())
    with_store(url, work)


@pytest.mark.parametrize(
    ("set_to", "is_then"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("remote_apply", "remote_apply")],
)
def test_a_commit_waits_for_the_disk_whatever_the_server_is_set_to(
    postgresql: PostgreSQLServer, database: str, set_to: str, is_then: str
) -> None:
    with postgresql.connected() as connection:
        connection.execute(
            f"ALTER DATABASE {database_name(database)} SET synchronous_commit = {set_to}"
        )

    async def work(store: Store) -> None:
        def setting(connection: Connection) -> str:
            return str(connection.exec_driver_sql("SHOW synchronous_commit").scalar_one())

        assert await store.operators.write_as_leader(setting) == is_then

    with_store(database, work)


def test_nul_characters_are_stored_as_replacement_characters(empty_database: str) -> None:
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


def test_the_planner_uses_the_partial_indexes(database: str) -> None:
    """No frequent query scans the finished jobs, however many they are."""
    insert_copies = (
        "INSERT INTO jobs (job_id, api_name, api_id, spec, created_ns, "
        "state, wanted, attempt, end_ns) "
        "SELECT job_id || n, api_name, api_id, spec, created_ns, 'failed', 'run', 1, n "
        "FROM jobs, generate_series(1, 20000) n"
    )

    async def work(store: Store) -> None:
        await store.deploy([spec().model_copy(update={"limits": Limits(max_waiting=5)})])
        await store.submit(draft())
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(insert_copies)
            connection.execute("ANALYZE")
        queries: list[tuple[str, Any]] = []

        def record(*call: Any) -> None:
            queries.append((call[2], call[3]))

        event.listen(Engine, "before_cursor_execute", record)
        await store.submit(draft())
        await store.jobs_in_progress()
        await store.jobs_with_folder(100, 10)
        await store.jobs_ended(100, 10)
        await store.list_jobs("a", limit=10)
        await store.undeploy("a", "deleted")
        event.remove(Engine, "before_cursor_execute", record)
        plans = []
        with psycopg.connect(database) as connection:
            for statement, values in queries:
                if statement.startswith(("SELECT", "UPDATE")):
                    rows = connection.execute(f"EXPLAIN {statement}", values)
                    plans.append("\n".join(line for (line,) in rows.fetchall()))
        plan = "\n\n".join(plans)
        assert len(plans) > 8
        assert "Seq Scan on jobs" not in plan, plan
        for index in ("jobs_in_progress", "jobs_finished", "jobs_waiting"):
            assert index in plan, plan

    with_store(database, work)
