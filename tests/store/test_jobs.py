"""Jobs in the store: guarded transitions, their order, and writes that are committed together."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cortex.errors import Conflict, NotFound
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import FINAL, SHOWN, TRANSITIONS, Event, State, Status, Wanted
from cortex.store import Replay, Store, events
from store.store_harness import EVENTS, draft, end, job_in, with_store


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("state", list(State))
def test_the_store_takes_exactly_the_events_of_the_table(
    store_url: str, state: State, event: Event
) -> None:
    async def work(store: Store) -> None:
        before = await job_in(store, state)
        job_id = before.spec.job_id
        assert await store.job(job_id) == before
        assert before.state is state
        next_event = EVENTS.get(event) or end(event)
        if not isinstance(next_event, events.Stop):
            next_event = replace(next_event, attempt=before.attempt)
        outcome = await store.apply(job_id, next_event)
        expected = TRANSITIONS.get((state, event))
        assert outcome.taken == (expected is not None)
        assert outcome.job == await store.job(job_id)
        if expected is None:
            assert outcome.job == before
        else:
            assert outcome.job is not None and outcome.job.state is expected

    with_store(store_url, work)


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING])
@pytest.mark.parametrize(
    "event", [e for (s, e), t in TRANSITIONS.items() if t in FINAL and s is State.RUNNING]
)
def test_an_acknowledged_stop_is_final(store_url: str, state: State, event: Event) -> None:
    async def work(store: Store) -> None:
        job = await job_in(store, state)
        stopped = (await store.apply(job.spec.job_id, EVENTS[Event.STOP])).job
        assert stopped is not None and stopped.wanted is Wanted.STOP
        again = await store.apply(job.spec.job_id, events.Stop(2**62, "x"))
        assert not again.taken
        ended = (await store.apply(job.spec.job_id, end(event, end_ns=2**62))).job
        assert ended is not None
        assert SHOWN[ended.state, ended.wanted] is Status.STOPPED
        shown = ("start_ns", "end_ns", "message", "result")
        assert [getattr(ended, f) for f in shown] == [getattr(stopped, f) for f in shown]

    with_store(store_url, work)


def test_the_times_of_a_job_are_ordered_even_if_the_clock_goes_back(store_url: str) -> None:
    async def work(store: Store) -> None:
        job = await job_in(store, State.RUNNING)
        done = (await store.apply(job.spec.job_id, end(Event.SUCCEED, end_ns=5))).job
        assert done is not None and done.start_ns is not None and done.end_ns is not None
        assert job.spec.created_ns <= done.start_ns <= done.end_ns

    with_store(store_url, work)


def test_an_event_of_an_earlier_attempt_changes_nothing(store_url: str) -> None:
    async def work(store: Store) -> None:
        job, _ = await store.submit(draft())
        await store.apply(job.spec.job_id, EVENTS[Event.CLAIM])
        await store.apply(job.spec.job_id, events.Unclaim(1))
        await store.apply(job.spec.job_id, events.Claim(1, "h"))
        late = await store.apply(job.spec.job_id, end(Event.SUCCEED))
        assert not late.taken
        assert late.job is not None and late.job.state is State.STARTING

    with_store(store_url, work)


def test_an_event_of_an_unknown_job_changes_nothing(store_url: str) -> None:
    async def work(store: Store) -> None:
        outcome = await store.apply("nothing", EVENTS[Event.STOP])
        assert (outcome.taken, outcome.job) == (False, None)

    with_store(store_url, work)


def test_a_write_that_fails_affects_no_other_of_its_commit(store_url: str) -> None:
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

    with_store(store_url, work)


def test_jobs_are_numbered_in_the_order_of_their_submits(store_url: str) -> None:
    async def work(store: Store) -> None:
        drafts = [draft("nothing" if number % 7 == 3 else "a") for number in range(100)]
        results = await asyncio.gather(*map(store.submit, drafts), return_exceptions=True)
        taken = [result[0] for result in results if not isinstance(result, BaseException)]
        assert all(isinstance(job, JobRecord) for job in taken)
        assert [job.seq for job in taken] == sorted({job.seq for job in taken})
        assert [d.job_id for d in drafts if d.api_name == "a"] == [j.spec.job_id for j in taken]

    with_store(store_url, work)


def test_a_message_that_is_not_valid_unicode_is_stored_with_escapes(store_url: str) -> None:
    async def work(store: Store) -> None:
        job = await job_in(store, State.RUNNING)
        failed = end(Event.FAIL, message="ValueError: \ud800")
        ended = (await store.apply(job.spec.job_id, failed)).job
        assert ended is not None and ended.message == "ValueError: \\ud800"
        assert await store.job(job.spec.job_id) == ended

    with_store(store_url, work)
