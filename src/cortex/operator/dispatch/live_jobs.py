"""The jobs in progress, in memory as the store holds them, and the events on their way there.

`LiveJobs` owns them: only its methods add, change or remove one. The dispatcher alone calls those
methods; all other callers use `find`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from cortex.engines.base import Version
from cortex.errors import OutcomeUnknown, StorageUnavailable, Superseded
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import FINAL, Event
from cortex.spec.times import now_ns
from cortex.store import Store
from cortex.store.events import End, JobEvent

log = structlog.get_logger()

STORAGE_RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class LiveJob:
    """A job in progress.

    Attributes:
        record: the job as it was stored last, without a config that is long.
        explain: says why a waiting job waits; see `why_waiting`.
        version: None until the job's version is ready, or described for a job that was recovered.
        unreachable: why the engine cannot report the state of the job right now; None if it can.
        blocked_by: what the machine lacks right now, while the start is retried until it has it
            again.
        engine_wait: why the engine has not started the job yet, after `Engine.start`.
        failed_starts: how many attempts ended for no known reason before any code of the user's
            ran. A restart of the operator starts the count again.
        deadline: by the monotonic clock, which the engine's processes share.
        timer: of the deadline, while the job waits.
    """

    record: JobRecord
    explain: Callable[[LiveJob], str | None]
    version: Version | None = None
    stop_wanted: bool = False
    unreachable: str | None = None
    blocked_by: str | None = None
    engine_wait: str | None = None
    failed_starts: int = 0
    deadline: float | None = None
    timer: asyncio.TimerHandle | None = None
    _change: asyncio.Event | None = None  # made for the first that waits: most jobs have none

    @property
    def job_id(self) -> str:
        return self.record.spec.job_id

    @property
    def api_name(self) -> str:
        return self.record.spec.api_name

    @property
    def why_waiting(self) -> str | None:
        """What a waiting job waits for, in words; None where it does not wait."""
        return self.explain(self)

    @property
    def is_overdue(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    async def changed(self) -> None:
        """Return at the next change that a client can observe."""
        if self._change is None:
            self._change = asyncio.Event()
        await self._change.wait()

    def notify(self) -> None:
        """Wake all that wait in `changed`."""
        if self._change is not None:
            self._change.set()
            self._change = None

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class LiveJobs:
    """All methods are called on the event loop."""

    def __init__(self, store: Store, on_change: Callable[[JobRecord, LiveJob], None]) -> None:
        """
        Args:
            on_change: called after each change of a record, with the record before it.
        """
        self._store = store
        self._on_change = on_change
        self._jobs: dict[str, LiveJob] = {}

    def find(self, job_id: str) -> LiveJob | None:
        """A job in progress; None for any other."""
        return self._jobs.get(job_id)

    def all(self) -> list[LiveJob]:
        """All jobs in progress."""
        return list(self._jobs.values())

    def add(self, record: JobRecord, explain: Callable[[LiveJob], str | None]) -> LiveJob:
        """Add a job that is in progress. A long config stays in the store until the job starts."""
        live = LiveJob(record.without_long_config(), explain)
        self._jobs[live.job_id] = live
        return live

    def update(self, live: LiveJob, record: JobRecord) -> None:
        """The store holds this of the job now. A job in a final state is removed."""
        before, live.record = live.record, record
        if record.state in FINAL:
            self._jobs.pop(live.job_id, None)
            live.cancel_timer()
        self._on_change(before, live)
        live.notify()

    async def apply(self, live: LiveJob, event: JobEvent) -> JobRecord | None:
        """Store an event. Retries for as long as the store takes no writes.

        Returns:
            The job after the event; None where the store did not take the event.
        """
        while True:
            try:
                outcome = await self._store.apply(live.job_id, event, live.record.spec)
                break
            except Superseded:
                await asyncio.Event().wait()  # the new leader attends to it; closing ends this wait
            except (StorageUnavailable, OutcomeUnknown) as error:  # an event is stored only once
                log.error(
                    "store unavailable",
                    job=live.job_id,
                    transition=event.event.value,
                    error=error.message,
                )
                await asyncio.sleep(STORAGE_RETRY_S)
        if outcome.job is not None:
            self.update(live, outcome.job.without_long_config())
        return outcome.job if outcome.taken else None

    async def fail(self, live: LiveJob, reason: str) -> None:
        """The platform fails a job."""
        await self.apply(live, platform_end(Event.LOSE, live.record, reason))

    def close(self) -> None:
        """Stop all timers, and wake all that wait for a change."""
        for live in self._jobs.values():
            live.cancel_timer()
            live.notify()


def platform_end(event: Event, record: JobRecord, message: str) -> End:
    """An end that the platform decides, without a report of the job's supervisor."""
    return End(event, record.attempt, now_ns(), message)
