"""Exit records that pass the check are stored, and read as they were."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from sqlalchemy import update

from cortex.spec.lifecycle import Event, State
from cortex.store import Store
from cortex.store.database import connect
from cortex.store.events import End
from cortex.store.schema import jobs
from cortex.worker.checks import Invalid
from cortex.worker.messages import ExitRecord
from store.store_harness import job_in, with_store
from unit.test_checks import END, check_strict, mutated

NUMBER = 60
SUCCEEDED = End(Event.SUCCEED, 1, 2, None, start_ns=1, exit_code=0, result="1")


def valid_records() -> list[ExitRecord]:
    """Mutated exit records that the check accepts."""
    rng = random.Random("stored")
    records: list[ExitRecord] = []
    while len(records) < NUMBER:
        value = mutated(rng, mutated(rng, END))
        try:
            records.append(ExitRecord.loads(json.dumps(value).encode()))
        except Invalid:
            continue
    return records


def test_a_valid_exit_record_is_stored_and_read_as_it_was(store_url: str) -> None:
    async def work(store: Store) -> None:
        for record in valid_records():
            job = await job_in(store, State.RUNNING)
            ending = End(
                Event.SUCCEED,
                1,
                record.end_ns,
                record.message,
                start_ns=record.start_ns,
                exit_code=record.exit_code,
                result=json.dumps(record.result) if record.has_result else None,
            )
            assert (await store.apply(job.spec.job_id, ending)).taken
            shown = await store.job(job.spec.job_id)
            assert shown is not None
            check_strict([shown.result, shown.message, shown.exit_code, shown.end_ns])
            result = None if shown.result is None else json.loads(shown.result)
            assert (shown.has_result, result) == (record.has_result, record.result)
            message = record.message and record.message.replace("\0", "\ufffd")
            assert shown.message in (message, record.message)
        assert len((await store.list_jobs("a", limit=NUMBER)).jobs) == NUMBER

    with_store(store_url, work)


@pytest.mark.parametrize("stored", ["NaN", "[-Infinity]", "{", "[" * 900 + "]" * 900])
def test_a_result_that_is_not_valid_json_is_left_out(store_url: str, stored: str) -> None:
    async def work(store: Store) -> None:
        job = await job_in(store, State.RUNNING)
        shown = (await store.apply(job.spec.job_id, replace(SUCCEEDED, result=stored))).job
        assert shown is not None
        assert (shown.has_result, shown.result, shown.exit_code) == (False, None, 0)
        assert "not kept" in (shown.message or "")
        assert (await store.list_jobs("a", limit=9)).jobs == [shown]

    with_store(store_url, work)


def test_an_invalid_long_result_of_an_earlier_version_is_left_out(store_url: str) -> None:
    async def work(store: Store) -> None:
        job = await job_in(store, State.RUNNING)
        await store.apply(job.spec.job_id, SUCCEEDED)
        engine = connect(store_url)
        with engine.begin() as connection:
            connection.execute(update(jobs).values(result="[" * 99999))
        engine.dispose()
        whole = await store.whole_job(job.spec.job_id)
        assert whole is not None
        assert (whole.has_result, whole.result) == (False, None)
        [listed] = (await store.list_jobs("a", limit=9)).jobs
        assert listed.result is None

    with_store(store_url, work)
