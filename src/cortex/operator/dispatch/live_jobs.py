"""The jobs in progress, in memory as the store holds them, and their events on the way there. Used by the
dispatcher and the queue alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from cortex.errors import OutcomeUnknown, StorageUnavailable, Superseded
from cortex.operator.dispatch.live_job import LiveJob, ending
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import FINAL, Event
from cortex.store import Facts, Store
from cortex.system.background import Background

log = structlog.get_logger()

STORAGE_RETRY_S = 1.0


class LiveJobs:
    """All methods are called on the event loop."""

    def __init__(
        self,
        store: Store,
        finished: Callable[[str], None] | None = None,
        changed: Callable[[JobRecord, JobRecord], None] | None = None,
    ) -> None:
        """
        Args:
            finished: told of each job whose log grows no more.
            changed: told of each job that was stored anew, as it was before and as it is now.
        """
        self.live: dict[str, LiveJob] = {}
        self.tasks = Background("dispatcher failed")
        self.over: Callable[[LiveJob], None] = lambda _: None
        """Called for each job that has reached a final state."""
        self._store = store
        self._finished = finished
        self._changed = changed

    @property
    def is_closed(self) -> bool:
        """Whether this operator drives no more."""
        return self.tasks.is_closed

    async def close(self) -> None:
        """Give up what is under way; whoever waits for a change is woken."""
        for live in self.live.values():
            if live.timer is not None:
                live.timer.cancel()
            live.changed()
        await self.tasks.close()

    async def apply(self, live: LiveJob, event: Event, facts: Facts) -> JobRecord | None:
        """Take an event of the job's current attempt, and wait for a store that takes no writes;
        the job after it, or None where it was not taken."""
        job_id = live.record.spec.job_id
        facts = {"of_attempt": live.record.attempt, **facts}
        while True:
            try:
                outcome = await self._store.apply(job_id, event, facts, live.record.spec)
                break
            except Superseded:
                await asyncio.Event().wait()  # whoever drives now sees to it; `close` ends this
            except (StorageUnavailable, OutcomeUnknown) as error:  # what was made is not made again
                log.error(
                    "store unavailable", job=job_id, transition=event.value, error=error.message
                )
                await asyncio.sleep(STORAGE_RETRY_S)
        if outcome.job is not None:
            self.see(live, outcome.job.without_long_config())
        return outcome.job if outcome.taken else None

    async def lose(self, live: LiveJob, reason: str) -> None:
        """The platform fails a job."""
        await self.apply(live, Event.LOSE, ending(message=reason))

    def see(self, live: LiveJob, record: JobRecord) -> None:
        """This is the job now."""
        if self._changed is not None:
            self._changed(live.record, record)
        live.record = record
        if record.state in FINAL:
            self.live.pop(record.spec.job_id, None)
            if live.timer is not None:
                live.timer.cancel()
            self.over(live)
            if self._finished is not None:
                self._finished(record.spec.job_id)
        live.changed()
