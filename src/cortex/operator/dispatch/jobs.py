"""Jobs, as the routes use them. The store holds the truth about each job. The leader dispatches the
jobs; the other operators store submits and stops, and the store notifies the leader of them.

Made by the app; a listener of the store's change feed.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cortex.engines.base import Engine
from cortex.errors import Superseded
from cortex.operator.dispatch.dispatcher import Dispatcher
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.spec.api import Compute
from cortex.spec.audit import Actor
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import IN_PROGRESS, Wanted
from cortex.spec.times import now_ns
from cortex.store import Outcome, Replay, Store
from cortex.store.events import Stop


class Jobs:
    """All methods are called on the event loop. Implements `store.ChangeListener`."""

    def __init__(
        self,
        store: Store,
        on_apis_changed: Callable[[], None],
        on_leader_changed: Callable[[], None],
    ) -> None:
        """
        Args:
            on_apis_changed: called when another operator may have deployed.
            on_leader_changed: called when another operator may be the leader.
        """
        self._store = store
        self._on_apis_changed = on_apis_changed
        self._on_leader_changed = on_leader_changed
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._dispatcher: Dispatcher | None = None  # once it is open
        self._notified: Dispatcher | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this operator is the leader, as far as it knows."""
        return self._dispatcher is not None

    def begin_term(self, dispatcher: Dispatcher) -> None:
        """Notify a dispatcher of all changes from now on. It is not open yet."""
        self._notified = dispatcher

    def dispatch_with(self, dispatcher: Dispatcher) -> None:
        """The dispatcher is open: this operator is the leader."""
        self._dispatcher = dispatcher

    def end_term(self) -> None:
        """This operator is not the leader any longer."""
        self._dispatcher = self._notified = None

    async def submit(self, draft: JobSpec, replay: Replay | None) -> JobRecord:
        """Store a job, which the leader dispatches.

        Raises:
            NotFound, Conflict, OverLimit, StorageUnavailable: as `Store.submit` does.
            Conflict: no machine can ever run the job. Only the leader knows the machines: a job
                that another operator stores is refused by the leader, as `status_unexpected_error`.
        """
        if (dispatcher := self._dispatcher) is not None:
            with suppress(Superseded):  # it claimed the job, and is not the leader any longer
                record = await dispatcher.submit(draft, replay)
                self._wake(record.spec.job_id)  # a poll may have come between the commit and this
                if dispatcher is not self._notified:  # its term has ended meanwhile
                    self._notify(record.spec.job_id)
                return record
        record, is_new = await self._store.submit(draft, replay)
        if is_new:
            self._notify(record.spec.job_id)
        return record

    async def stop(self, job_id: str, actor: Actor) -> Outcome:
        """Stop a job. The stop is durable when this returns.

        Returns:
            An outcome that is not taken where the job is unknown, completed, or already stopped.
        """
        stop = Stop(now_ns(), "stopped by a user")
        outcome = await self._store.apply(job_id, stop, actor=actor)
        if outcome.taken and outcome.job is not None:
            self.stop_stored(outcome.job)
        return outcome

    def stop_stored(self, record: JobRecord) -> None:
        """This operator has stored a stop of this job."""
        if self._is_current:
            assert self._dispatcher is not None
            self._dispatcher.stop_stored(record)
        else:
            self._notify(record.spec.job_id)

    def find(self, job_id: str) -> LiveJob | None:
        """A job in progress, where this operator is the leader; else None."""
        return None if self._dispatcher is None else self._dispatcher.live_jobs.find(job_id)

    @property
    def engine(self) -> Engine | None:
        """The engine of this operator's term; None where it is not the leader."""
        return None if self._dispatcher is None else self._dispatcher.engine

    def lasting_refusal(self, compute: Compute) -> str | None:
        """See `Dispatcher.lasting_refusal`. None where this operator is not the leader."""
        return None if self._dispatcher is None else self._dispatcher.lasting_refusal(compute)

    def all_live(self) -> list[LiveJob] | None:
        """All jobs in progress; None where this operator is not the leader."""
        return None if self._dispatcher is None else self._dispatcher.live_jobs.all()

    def hints(self, api_id: str) -> list[str]:
        """Hints for the users of a version; none where this operator is not the leader."""
        return [] if self._dispatcher is None else self._dispatcher.hints(api_id)

    async def record(self, job_id: str) -> JobRecord | None:
        """A job as the store holds it; None where it holds none. A config that is long is left out.

        Raises:
            StorageUnavailable: the store cannot be read now.
        """
        live = self.find(job_id) if self._is_current else None
        return await self._store.job(job_id) if live is None else live.record

    async def next_record(self, job_id: str, within_s: float) -> JobRecord | None:
        """A job after its next change that a client can observe, or as it is after `within_s`
        seconds; at once where it is not in progress. None where the store does not have it.

        Raises:
            StorageUnavailable: the store cannot be read now.
        """
        if self._is_current and (live := self.find(job_id)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await live.changed()
            return live.record
        with self._notified_of(job_id) as changed:
            record = await self._store.job(job_id)
            if record is None or record.state not in IN_PROGRESS or record.wanted is Wanted.STOP:
                return record
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await changed.wait()
        return await self._store.job(job_id)

    def refresh(self, record: JobRecord) -> None:
        """A job was just read: the leader's dispatcher may not have been notified of it yet."""
        if self._dispatcher is not None and not self._is_current:
            self._dispatcher.refresh(record)

    def on_job_changed(self, job_id: str, *, own: bool) -> None:
        """See `store.ChangeListener`."""
        self._wake(job_id)
        if self._notified is not None and not own:
            self._notified.on_job_changed(job_id)

    def on_apis_changed(self) -> None:
        """See `store.ChangeListener`."""
        self._on_apis_changed()

    def on_leader_changed(self) -> None:
        """See `store.ChangeListener`."""
        self._on_leader_changed()

    def on_all_may_have_changed(self) -> None:
        """See `store.ChangeListener`."""
        for job_id in self._waiting:
            self._wake(job_id)
        if self._notified is not None:
            self._notified.on_all_may_have_changed()
        self._on_apis_changed()
        self._on_leader_changed()

    @property
    def _is_current(self) -> bool:
        """Whether memory is as current as the store: no other operator can write there."""
        return self._dispatcher is not None and not self._store.is_shared

    def _wake(self, job_id: str) -> None:
        for changed in self._waiting.get(job_id, ()):
            changed.set()

    def _notify(self, job_id: str) -> None:
        """The store does not notify an operator of its own writes, and this one may lead by now."""
        if self._notified is not None:
            self._notified.on_job_changed(job_id)

    @contextmanager
    def _notified_of(self, job_id: str) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        self._waiting[job_id].add(changed)
        try:
            yield changed
        finally:
            self._waiting[job_id].discard(changed)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
