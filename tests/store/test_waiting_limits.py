"""The limits on waiting jobs: their bytes of config, and their number per API."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from cortex.errors import OverLimit, OverWaitingBytes
from cortex.spec.api import Limits
from cortex.spec.lifecycle import Event
from cortex.store import InitialClaim, Store, events
from store.recorded_leader import eventually, joined_election
from store.store_harness import EVENTS, draft, draft_of_size, spec, submit_when_free, with_store


def test_the_configs_of_waiting_jobs_stay_within_the_limit(store_url: str) -> None:
    async def work(deploying: Store) -> None:
        await deploying.operators.leave()
        store = Store(store_url, 10_000)
        leader = await joined_election(store)
        try:
            await eventually(lambda: leader.is_leader)
            first, _ = await store.submit(draft_of_size(6000))
            with pytest.raises(OverWaitingBytes, match=r"6000 bytes .* 5000 more .* 10000 "):
                await store.submit(draft_of_size(5000))
            for _ in range(2):
                await store.submit(draft_of_size(2000))
            with pytest.raises(OverWaitingBytes):
                await store.submit(draft())
            assert (await store.apply(first.spec.job_id, EVENTS[Event.CLAIM])).taken
            await submit_when_free(store, draft_of_size(3000))
            # A job that waits again counts; a job that is claimed in its submit does not.
            assert (await store.apply(first.spec.job_id, events.Unclaim(1))).taken
            with pytest.raises(OverWaitingBytes):
                await store.submit(draft())
            api_id = first.spec.api_id
            assert (await store.submit(draft_of_size(9000), claim=InitialClaim(api_id, "h")))[1]
        finally:
            await store.operators.leave()
            store.close()

    with_store(store_url, work)


def test_the_limit_on_waiting_bytes_holds_for_several_operators(empty_database: str) -> None:
    async def work(_leader: Store) -> None:
        others = [Store(empty_database, 1_000_000) for _ in range(3)]
        try:
            submits = [store.submit(draft_of_size(100_000)) for _ in range(5) for store in others]
            results = await asyncio.gather(*submits, return_exceptions=True)
            refused = [error for error in results if isinstance(error, OverWaitingBytes)]
            assert (len(results), len(refused)) == (15, 5)
            # Each operator adds up the small configs only now and then.
            small = [store.submit(draft_of_size(5000)) for _ in range(40) for store in others]
            await asyncio.gather(*small, return_exceptions=True)
            with psycopg.connect(empty_database) as connection:
                row = connection.execute("SELECT sum(config_bytes) FROM jobs").fetchone()
            assert row is not None
            waiting = int(row[0])
            assert 1_000_000 <= waiting <= 1_000_000 * (1 + 3 / 16)
        finally:
            for store in others:
                store.close()

    with_store(empty_database, work)


def test_the_limit_of_an_api_holds_beside_the_limit_of_all(store_url: str) -> None:
    async def work(store: Store) -> None:
        await store.deploy([spec("b").model_copy(update={"limits": Limits(max_waiting=1)})])
        await store.submit(draft("b"))
        with pytest.raises(OverLimit) as caught:
            await store.submit(draft("b"))
        assert caught.value.kind == "limit.max_waiting"

    with_store(store_url, work)
