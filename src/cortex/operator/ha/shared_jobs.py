"""Jobs, where several operators have them: what is stored is the truth, for any of them may have stored it
a moment ago. One of them drives; the others leave that to it, and hear of it as it is committed.

Made by the app for a store that can be shared; it stands in the dispatcher's place for the routes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cortex.errors import Superseded
from cortex.operator.dispatch.dispatcher import Dispatcher
from cortex.operator.dispatch.live_job import LiveJob
from cortex.spec.api import ApiSpec
from cortex.spec.audit import Actor
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import IN_PROGRESS, Event, Wanted
from cortex.spec.times import now_ns
from cortex.store import Facts, Outcome, Replay, Store


class SharedJobs:
    """All methods are called on the event loop. It is told of changes as a `store.ChangeListener`."""

    def __init__(
        self, store: Store, apis_changed: Callable[[], None], driver_changed: Callable[[], None]
    ) -> None:
        self._store = store
        self._apis_changed = apis_changed
        self._driver_changed = driver_changed
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._dispatcher: Dispatcher | None = None
        self._hears: Dispatcher | None = None

    @property
    def drives(self) -> bool:
        """Whether this operator is the one that drives, as far as it knows."""
        return self._dispatcher is not None

    def driven_by(self, dispatcher: Dispatcher | None, *, is_open: bool) -> None:
        """Let this one know of all changes from now on, and once it is open ask it first."""
        self._hears = dispatcher
        self._dispatcher = dispatcher if is_open else None

    # What routes ask

    async def submit(self, draft: JobSpec, replay: Replay | None) -> JobRecord:
        """Store a job, which whoever drives sees to.

        Raises:
            NotFound, Conflict, OverLimit, StorageUnavailable: as `Store.submit` does.
        """
        if (dispatcher := self._dispatcher) is not None:
            with suppress(Superseded):  # it claimed the job, and does not drive any more
                record = await dispatcher.submit(draft, replay)
                if dispatcher is not self._hears:  # its term has ended meanwhile
                    self._tell(record.spec.job_id)
                return record
        record, is_new = await self._store.submit(draft, replay)
        if is_new:
            self._tell(record.spec.job_id)
        return record

    async def stop(self, job_id: str, actor: Actor) -> Outcome:
        """Stop a job: durable when this returns. Not taken: it is unknown, had completed, or was
        stopped before."""
        facts: Facts = {"end_ns": now_ns(), "message": "stopped by a user"}
        outcome = await self._store.apply(job_id, Event.STOP, facts, actor=actor)
        if outcome.taken:
            self._tell(job_id)
        return outcome

    def stopped(self, record: JobRecord) -> None:
        """A stop was stored by this operator."""
        self._tell(record.spec.job_id)

    def deployed(self, spec: ApiSpec) -> None:
        """This is the current version of its API from now on."""
        if self._hears is not None:
            self._hears.deployed(spec)

    def record(self, job_id: str) -> JobRecord | None:
        """None: the store has to be asked."""
        return None

    async def next(self, job_id: str, within_s: float) -> JobRecord | None:
        """A job after its next change, or as it is when the time is over; at once where it is not in
        progress any more."""
        with self._woken_for(job_id) as changed:
            record = await self._store.job(job_id)
            if record is None or record.state not in IN_PROGRESS or record.wanted is Wanted.STOP:
                return record
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await changed.wait()
        return await self._store.job(job_id)

    def heard(self, record: JobRecord) -> None:
        """A job as it was read a moment ago: whoever drives may not have been told of it yet."""
        if self._dispatcher is not None:
            self._dispatcher.heard(record)

    def live(self) -> list[LiveJob] | None:
        """All jobs in progress; None where this operator does not drive."""
        return None if self._dispatcher is None else self._dispatcher.live()

    def in_progress(self, job_id: str) -> bool:
        """Whether this operator drives the job, and has not seen the end of its processes."""
        return self._dispatcher is not None and self._dispatcher.in_progress(job_id)

    async def change(self, job_id: str) -> None:
        """Return when the job changes in any way that shows, or at once if it is not driven here."""
        if self._dispatcher is not None:
            await self._dispatcher.change(job_id)

    def unreachable(self, job_id: str) -> str | None:
        """Why the engine cannot be asked after a job right now, if so and if it is driven here."""
        return None if self._dispatcher is None else self._dispatcher.unreachable(job_id)

    def why_waiting(self, job_id: str) -> str | None:
        """What a waiting job waits for, in words, if it is driven here."""
        return None if self._dispatcher is None else self._dispatcher.why_waiting(job_id)

    def hints(self, api_id: str) -> list[str]:
        """What the users of a version should know; nothing where this operator does not drive."""
        return [] if self._dispatcher is None else self._dispatcher.hints(api_id)

    # What is told

    def job_changed(self, job_id: str, *, own: bool) -> None:
        """See `store.ChangeListener`."""
        for changed in self._waiting.get(job_id, ()):
            changed.set()
        if self._hears is not None and not own:
            self._hears.news(job_id)

    def apis_changed(self) -> None:
        """See `store.ChangeListener`."""
        self._apis_changed()

    def driver_changed(self) -> None:
        """See `store.ChangeListener`."""
        self._driver_changed()

    def all_may_have_changed(self) -> None:
        """See `store.ChangeListener`."""
        for events in self._waiting.values():
            for changed in events:
                changed.set()
        if self._hears is not None:
            self._hears.all_news()
        self._apis_changed()
        self._driver_changed()

    def _tell(self, job_id: str) -> None:
        """What is own is not told: this operator may have begun to drive meanwhile."""
        if self._hears is not None:
            self._hears.news(job_id)

    @contextmanager
    def _woken_for(self, job_id: str) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        self._waiting[job_id].add(changed)
        try:
            yield changed
        finally:
            self._waiting[job_id].discard(changed)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
