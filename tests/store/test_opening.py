"""Opening a database: its migrations, and databases that the store refuses."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import insert, text

import cortex.store
from cortex.errors import OverWaitingBytes, StartupError
from cortex.spec.job import encode
from cortex.spec.lifecycle import Event
from cortex.store import Store
from cortex.store.database import connect, migrate
from cortex.store.schema import REVISION, jobs, metadata
from postgresql_server import PostgreSQLServer
from store.store_harness import EVENTS, draft_of_size, spec, submit_when_free

LONG = encode({"text": "ä" * 5000})


def test_the_migrations_result_in_the_schema_of_the_code(new_url: str) -> None:
    engine = connect(new_url)
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_heads() == (REVISION,)
    engine.dispose()


def test_a_start_with_a_current_schema_loads_no_migrations(store_url: str) -> None:
    Store(store_url).close()
    code = (
        "import sys, cortex.operator.app\n"
        "cortex.operator.app.Store(sys.argv[1]).close()\n"
        "print([name for name in ('alembic', 'httpx') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store_url], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_jobs_of_an_earlier_schema_are_read_and_counted(new_url: str) -> None:
    engine = connect(new_url)
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
        store = Store(new_url, 40_000)
        try:
            waiting, ended = await store.job("1a"), await store.job("1b")
            assert waiting is not None
            assert ended is not None
            assert (waiting.spec.config, ended.has_result, ended.result) == (None, True, None)
            whole = await store.whole_job("1b")
            assert whole is not None
            assert (whole.spec.config, whole.result) == (LONG, LONG)
            with pytest.raises(OverWaitingBytes):
                await store.submit(draft_of_size(20_000))
            claimed = (await store.apply("1a", EVENTS[Event.CLAIM], waiting.spec)).job
            assert claimed is not None
            assert claimed.spec.config == LONG
            await submit_when_free(store, draft_of_size(20_000))
        finally:
            store.close()

    asyncio.run(work())


def test_a_database_of_a_newer_version_is_refused(new_url: str) -> None:
    Store(new_url).close()

    engine = connect(new_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartupError, match="another version"):
        Store(new_url)
    engine.dispose()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "operator.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StartupError, match="cannot be used"):
        Store(f"sqlite:///{path}")


def test_operators_that_start_at_the_same_time_migrate_one_after_another(
    postgresql: PostgreSQLServer,
) -> None:
    name = postgresql.create()
    with ThreadPoolExecutor(4) as pool:
        for store in pool.map(lambda _: Store(postgresql.url(name)), range(4)):
            store.close()
    postgresql.drop(name)
