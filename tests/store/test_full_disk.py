"""A store whose disk is full: it stores no half of a write, and recovers."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.disk import mounted
from cortex.errors import StorageUnavailable
from cortex.spec.job import encode
from cortex.store import Store
from postgresql_server import PostgreSQLServer
from store.store_harness import KILLS_POSTGRESQL, draft, stored_ids, with_store


def test_a_full_disk_under_sqlite_stores_nothing_and_recovers(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        # SQLite refuses to grow past max_page_count as it does on a full disk: SQLITE_FULL.
        pragma = "PRAGMA max_page_count = {}"
        await store.operators.write_as_leader(
            lambda c: c.exec_driver_sql(pragma.format(1)).scalar()
        )
        big = replace(draft(), config=encode({"x": "y" * 1_000_000}))
        with pytest.raises(StorageUnavailable):
            await store.submit(big)
        assert (await store.list_jobs("a", limit=10)).jobs == []
        await store.operators.write_as_leader(
            lambda c: c.exec_driver_sql(pragma.format(2**31)).scalar()
        )
        await store.submit(big)

    with_store(f"sqlite:///{tmp_path / 'operator.db'}", work)


@KILLS_POSTGRESQL
def test_a_full_disk_under_postgresql_stores_nothing_and_recovers(
    own_postgresql: PostgreSQLServer,
) -> None:
    # Only the user of the tests can enter pytest's own folder, and the server has another user.
    with (
        tempfile.TemporaryDirectory() as folder,
        mounted(Path(folder) / "disk", "size=40m") as disk,
    ):
        Path(folder).chmod(0o755)
        tablespace = disk.folder / "tablespace"
        tablespace.mkdir()
        if os.geteuid() == 0:
            os.chown(tablespace, 65534, 65534)
        with own_postgresql.connected() as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{tablespace}'")
        name = own_postgresql.create(TABLESPACE="small")

        async def work(store: Store) -> None:
            first, _ = await store.submit(draft())
            disk.fill()
            big = replace(draft(), config=encode({"x": os.urandom(1_000_000).hex()}))
            with pytest.raises(StorageUnavailable, match="No space left"):
                await store.submit(big)
            assert await stored_ids(store) == [first.spec.job_id]
            disk.empty()
            await store.submit(big)

        with_store(own_postgresql.url(name), work)
        own_postgresql.drop(name)
        with own_postgresql.connected() as connection:
            connection.execute("DROP TABLESPACE small")
