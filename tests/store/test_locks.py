"""The store's locks: between the tasks of one operator, and on PostgreSQL between operators."""

from __future__ import annotations

import asyncio

import pytest

from cortex.errors import StorageUnavailable
from cortex.store import Store, lock_keys
from postgresql_server import PostgreSQLServer
from store.store_harness import KILLS_POSTGRESQL, with_store


@pytest.mark.parametrize("name", ["deploy_lock", "join_lock"])
def test_a_lock_admits_one_task_at_a_time(store_url: str, name: str) -> None:
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

    with_store(store_url, work)


def test_the_keys_of_the_locks_differ_and_are_the_same_in_all_versions() -> None:
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


def test_a_lock_admits_one_operator_at_a_time(database: str) -> None:
    async def main() -> None:
        first, second = Store(database), Store(database)
        first_lock, second_lock = first.deploy_lock, second.deploy_lock
        async with first_lock:
            waiting = asyncio.create_task(second_lock.__aenter__())
            await asyncio.sleep(0.2)
            assert not waiting.done()
        await waiting
        await second_lock.__aexit__()
        async with first_lock:  # a task that is cancelled does not acquire it later
            waiting = asyncio.create_task(second_lock.__aenter__())
            await asyncio.sleep(0.2)
            waiting.cancel()
        async with asyncio.timeout(30), second_lock:
            pass
        first.close()
        second.close()

    asyncio.run(main())


@KILLS_POSTGRESQL
def test_a_lock_is_not_acquired_while_the_server_is_down(own_postgresql: PostgreSQLServer) -> None:
    async def main() -> None:
        store = Store(own_postgresql.url(own_postgresql.create()))
        lock = store.deploy_lock
        own_postgresql.kill()
        with pytest.raises(StorageUnavailable):
            async with lock:
                pytest.fail("the lock was acquired")
        own_postgresql.start()
        async with lock:
            own_postgresql.kill()  # leaving the block raises nothing
        own_postgresql.start()
        async with lock:
            pass
        store.close()

    asyncio.run(main())
