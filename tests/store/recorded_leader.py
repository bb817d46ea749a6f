"""The callbacks of a leader, recorded; and waits for the outcome of an election."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psycopg

from cortex.store import Store

ADDRESS = "http://operator.invalid"


class RecordedLeader:
    """A `store.LeaderCallbacks` that records its calls."""

    def __init__(self) -> None:
        self.is_leader = False
        self.terms = 0
        self.lead_error: Exception | None = None
        """Raised by `lead`, if it is not None."""
        self.failures: list[Exception] = []

    async def lead(self) -> None:
        if self.lead_error is not None:
            raise self.lead_error
        self.is_leader = True
        self.terms += 1

    async def step_down(self) -> None:
        self.is_leader = False

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition is true; the test fails after a minute."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # another thread or a server makes it true
            await asyncio.sleep(0.02)


def sessions(database: str) -> int:
    """How many sessions of operators a database has: one ends a while after its connection."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cortex %'"
    query += " AND datname = current_database()"
    with psycopg.connect(database) as connection:
        found = connection.execute(query).fetchone()
    return 0 if found is None else int(found[0])


async def joined_election(
    store: Store, leader: RecordedLeader | None = None, *, lease_s: float = 30
) -> RecordedLeader:
    """Take part in the election, until `store.operators.leave`. While the session of an earlier
    leader has not ended, the result is not the leader yet."""
    leader = leader or RecordedLeader()
    store.operators.join("here", "this machine", ADDRESS)
    await store.operators.join_election(leader, lease_s)
    return leader
