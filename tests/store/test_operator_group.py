"""PostgreSQL only: which operators may use a database together."""

from __future__ import annotations

import asyncio

import pytest

from chaos.postgresql_proxy import postgresql_proxy
from cortex.errors import StartupError, Superseded
from cortex.spec.lifecycle import Event
from cortex.store import Store
from postgresql_server import PostgreSQLServer
from store.recorded_leader import ADDRESS, eventually, joined_election, sessions
from store.store_harness import EVENTS, draft, spec, stored_ids, through


def test_a_database_belongs_to_one_data_folder(database: str) -> None:
    for data_folder_id, is_right in (("here", True), ("there", False), ("here", True)):
        store = Store(database)
        if is_right:
            store.operators.join(data_folder_id, "this machine", ADDRESS)
        else:
            with pytest.raises(StartupError, match="belongs to another data folder"):
                store.operators.join(data_folder_id, "this machine", ADDRESS)
        store.close()


def test_an_operator_whose_data_folder_was_declared_lost_stores_nothing_after_its_return(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def main() -> None:
        cut_off = Store(through(proxy, database))
        leader = await joined_election(cut_off)
        await cut_off.deploy([spec()])
        job, _ = await cut_off.submit(draft())
        proxy.shut()  # it is cut off, and its administrator believes that its machine is lost
        await eventually(lambda: not sessions(database))
        store = Store(database)
        store.operators.join("there", "another machine", ADDRESS, instead_of="here")
        proxy.open()
        await eventually(lambda: not leader.is_leader)
        with pytest.raises(Superseded, match="was declared lost"):
            await cut_off.submit(draft())
        with pytest.raises(Superseded, match="was declared lost"):
            await cut_off.apply(job.spec.job_id, EVENTS[Event.STOP])
        assert await stored_ids(store) == [job.spec.job_id]
        assert store.operators.data_folder_ids() == {"there"}
        await cut_off.operators.leave()
        cut_off.close()
        await store.submit(draft())
        store.close()

    with postgresql_proxy(postgresql.folder) as proxy:
        asyncio.run(main())


def test_operators_that_are_connected_at_one_time_run_jobs_on_one_engine(database: str) -> None:
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
