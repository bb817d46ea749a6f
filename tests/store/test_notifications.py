"""PostgreSQL only: every operator is notified of every change."""

from __future__ import annotations

import asyncio

from cortex.spec.lifecycle import Event
from cortex.store import Store
from postgresql_server import PostgreSQLServer
from store.recorded_leader import eventually, joined_election
from store.store_harness import EVENTS, another_operator, draft, end, end_sessions, spec


class RecordedChanges:
    """A `store.ChangeListener`."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, bool]] = []
        self.apis = 0
        self.terms = 0
        self.all_may_have_changed = 0

    def on_job_changed(self, job_id: str, *, own: bool) -> None:
        self.jobs.append((job_id, own))

    def on_apis_changed(self) -> None:
        self.apis += 1

    def on_leader_changed(self) -> None:
        self.terms += 1

    def on_all_may_have_changed(self) -> None:
        self.all_may_have_changed += 1


def test_every_operator_is_notified_of_every_change_after_its_commit(database: str) -> None:
    async def main() -> None:
        changes = RecordedChanges()
        first = Store(database)
        await first.operators.subscribe(changes)
        assert changes.all_may_have_changed == 1
        await joined_election(first)
        await eventually(lambda: changes.terms == 1)
        async with another_operator(database) as (second, _):
            await second.deploy([spec()])
            await eventually(lambda: changes.apis == 1)
            job, _ = await second.submit(draft())
            job_id = job.spec.job_id
            await first.apply(job_id, EVENTS[Event.CLAIM])
            await second.apply(job_id, EVENTS[Event.STOP])
            await first.apply(job_id, end(Event.LOSE))
            await eventually(lambda: len(changes.jobs) == 4)
            assert changes.jobs == [(job_id, own) for own in (False, True, False, True)]
            await second.undeploy("a", "deleted")
            await eventually(lambda: changes.apis == 2)
            await first.note_removed_folders([job_id])
            await first.remove_jobs([job_id])
            await first.ping()
            assert len(changes.jobs) == 4
        await first.operators.leave()
        first.close()

    asyncio.run(main())


def test_a_listener_that_lost_its_session_is_notified_that_all_may_have_changed(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def main() -> None:
        changes = RecordedChanges()
        store = Store(database)
        await store.operators.subscribe(changes)
        end_sessions(postgresql, database)
        await eventually(lambda: changes.all_may_have_changed == 2)
        async with another_operator(database) as (other, _):
            await other.deploy([spec()])
            await eventually(lambda: changes.apis == 1)
        await store.operators.leave()
        store.close()

    asyncio.run(main())
