"""Who drives, for tests of the store: it remembers what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psycopg

from cortex.store import Store

ADDRESS = "http://operator.invalid"


class RecordedLeader:
    """A `store.LeaderCallbacks`."""

    def __init__(self) -> None:
        self.drives = False
        self.terms = 0
        self.refuses: Exception | None = None
        self.failures: list[Exception] = []

    async def lead(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.drives = True
        self.terms += 1

    async def step_down(self) -> None:
        self.drives = False

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for a condition; the test fails when it never comes."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # it is another thread's, or a server's
            await asyncio.sleep(0.02)


def sessions(database: str) -> int:
    """How many of operators a database has: they end a while after their connections."""
    named = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cortex %'"
    named += " AND datname = current_database()"
    with psycopg.connect(database) as connection:
        found = connection.execute(named).fetchone()
    return 0 if found is None else int(found[0])


async def joined_election(
    store: Store, driver: RecordedLeader | None = None, *, lease_s: float = 30
) -> RecordedLeader:
    """Take part in the election, until `store.operators.leave`. While the session of an earlier
    leader has not ended, the result is not the leader yet."""
    driver = driver or RecordedLeader()
    store.operators.join("here", "this machine", ADDRESS)
    await store.operators.join_election(driver, lease_s)
    return driver
