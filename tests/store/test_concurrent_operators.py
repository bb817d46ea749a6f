"""PostgreSQL only: operators that write at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from cortex.errors import NotFound
from cortex.spec.lifecycle import Event, Wanted
from cortex.store import Outcome
from store.store_harness import EVENTS, another_operator, draft, spec


def test_a_job_of_an_api_that_another_operator_deletes_is_refused_or_stopped(database: str) -> None:
    async def main() -> None:
        async with (
            another_operator(database) as (first, _),
            another_operator(database) as (second, _),
        ):
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


def test_a_job_of_an_api_that_another_operator_deploys_again_is_accepted(database: str) -> None:
    async def main() -> None:
        async with (
            another_operator(database) as (first, _),
            another_operator(database) as (second, _),
        ):
            await first.deploy([spec()])
            work: list[Awaitable[object]] = [second.submit(draft()) for _ in range(40)]
            for position in range(0, 50, 10):
                work.insert(position, first.deploy([spec()]))
            await asyncio.gather(*work)

    asyncio.run(main())


def test_writes_that_deadlock_are_made(database: str) -> None:
    """Two transactions wait for each other's rows, and the server ends one of them."""

    async def main() -> None:
        async with (
            another_operator(database) as (first, _),
            another_operator(database) as (second, _),
        ):
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
