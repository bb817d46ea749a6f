"""The dispatcher joins store and engine: it moves each job from its observed to its wanted state.

It keeps in memory only what the store already holds, so a restart is nothing special: `open` reads
the unfinished jobs and goes on. Other operators on the same store may store jobs and stops as well;
the dispatcher reads those again when it is notified (`refresh`). `Admission` decides which waiting
job starts next, and the dispatcher alone acts on the decision.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection

import structlog

from cortex.engines.base import (
    CapacityFreed,
    Ended,
    Ending,
    Engine,
    Lost,
    NeverStarted,
    Observation,
    Reachable,
    Started,
    Unreachable,
    Waits,
)
from cortex.errors import Conflict, NotFound, OverLimit, StorageUnavailable, Superseded
from cortex.joblog.folders import JobFolders
from cortex.operator.deploy.catalogue import Catalogue, DeployedApi
from cortex.operator.deploy.versions import Versions
from cortex.operator.dispatch.live_jobs import LiveJob, LiveJobs
from cortex.operator.dispatch.refresh import Refresher
from cortex.operator.dispatch.starter import Starter, attempt_of
from cortex.spec.api import Compute
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import CLAIMED, FINAL, Event, State, Wanted
from cortex.store import Replay, Store, events
from cortex.system.background import Background

log = structlog.get_logger()

_MAX_FAILED_STARTS = 50  # about seven minutes, with the delays between them
_MAX_RETRY_DELAY_S = 10.0


class Dispatcher:
    """One for each term of a leader. All methods are called on the event loop."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        versions: Versions,
        catalogue: Catalogue,
        folders: JobFolders,
        on_change: Callable[[JobRecord, JobRecord], None] | None = None,
        on_finished: Callable[[JobRecord], None] | None = None,
        on_measures: Callable[[str, tuple[object, ...]], None] | None = None,
    ) -> None:
        """
        Args:
            on_change: called with a job before and after each change that was stored.
            on_finished: called with each job whose log grows no longer.
            on_measures: called with the name of an API and what the task of a job that has ended
                measured.
        """
        self.background = Background("dispatcher failed")
        self.live_jobs = LiveJobs(store, self._job_changed)
        self._store = store
        self.engine = engine
        self._versions = versions
        self._catalogue = catalogue
        self._on_change = on_change
        self._on_finished = on_finished
        self._on_measures = on_measures
        self._starter = Starter(
            self.live_jobs, engine, versions, catalogue, folders, self.background
        )
        self._refresher = Refresher(store, self.refresh)
        self._being_stored: set[str] = set()
        self._notified_while_storing: set[str] = set()
        self._hints: dict[str, tuple[str, ...]] = {}  # by version

    async def open(self) -> None:
        """Recover every job that an earlier operator left unfinished."""
        self._catalogue.subscribe(self)
        for api in self._catalogue.all():
            self._starter.admission.limit(api.name, api.max_running)
        unfinished = await self._store.jobs_in_progress()
        waiting = [record for record in unfinished if record.state is State.WAITING]
        for record in unfinished:
            if record.state is State.WAITING:
                continue
            live = self.live_jobs.add(record, self._starter.admission.why_waiting)
            live.stop_wanted = record.wanted is Wanted.STOP
            live.version = await self._versions.describe(record.spec.api_id)
            self._starter.admission.count_recovered(live.api_name, live.job_id)
            await self.engine.recover(attempt_of(live, record.spec))
            if live.stop_wanted:
                self.engine.stop(live.job_id)
        for record in waiting:  # last: until the others are recovered, free capacity is not known
            self._starter.add_waiting(record)
        self._refresher.open()

    async def close(self) -> None:
        """Stop dispatching. Started jobs go on, and submits that are being stored are answered."""
        self._catalogue.unsubscribe(self)
        self.live_jobs.close()
        await self.background.close()
        await self._refresher.close()

    async def submit(self, draft: JobSpec, replay: Replay | None) -> JobRecord:
        """Store a job and dispatch it. A job that can start now is claimed in the same commit.

        Raises:
            NotFound, Conflict, OverLimit, StorageUnavailable, Superseded: as `Store.submit` does.
            Conflict: no machine can ever run the job.
        """
        if (refusal := await self._refusal(draft.api_name)) is not None:
            return await self._earlier_job(draft, replay, refusal)
        # The server finishes this call even if the client disconnects: a stored job is dispatched.
        is_likely = replay is None and not self._being_stored
        claim = self._starter.claim_early(draft, prestart=is_likely)
        is_new = is_claimed = is_refused = False
        if claim is None:
            self._starter.admission.submit_begins()
        self._being_stored.add(draft.job_id)
        try:
            record, is_new = await self._store.submit(draft, replay, claim)
            is_claimed = is_new and record.state is State.STARTING
            is_refused = not is_new
        except (NotFound, Conflict, OverLimit):
            is_refused = True
            raise
        except Superseded:
            raise  # the caller stores the job again, without a claim
        except StorageUnavailable:
            is_refused = self._store.failed_write_stores_nothing
            raise
        finally:
            self._being_stored.discard(draft.job_id)
            if claim is None:
                self._starter.admission.submit_ends()
            elif not is_claimed:
                self._starter.cancel_claim(draft, is_refused=is_refused)
        if not is_new or self.background.is_closed:
            return record
        if draft.job_id in self._notified_while_storing:
            self._notified_while_storing.discard(draft.job_id)
            self._refresher.request(draft.job_id)
        if is_claimed:
            self._starter.start_claimed(record)
        else:
            self._starter.add_waiting(record)
        return record

    def lasting_refusal(self, compute: Compute) -> str | None:
        """Why no machine can run this, now or later, as far as that is certain; else None."""
        refusal = self.engine.ledger.refusal(compute)
        return None if refusal is None or self.engine.capabilities.may_grow else refusal

    async def _refusal(self, api_name: str) -> str | None:
        api = self._catalogue.find(api_name)
        if api is None or self.lasting_refusal(api.compute) is None:
            return None
        # Another operator may have deployed a smaller version a moment ago.
        await self._catalogue.refresh_if_others_deploy()
        api = self._catalogue.find(api_name)
        return None if api is None else self.lasting_refusal(api.compute)

    async def _earlier_job(self, draft: JobSpec, replay: Replay | None, refusal: str) -> JobRecord:
        """The job of an earlier submit with the same key, when there was a machine for it.

        Raises:
            Conflict: there is none, and a new job is refused.
        """
        earlier = None if replay is None else await self._store.submitted_before(draft, replay)
        if earlier is None:
            raise Conflict(
                f"no job of {draft.api_name!r} can run here: {refusal}. Nothing was stored; change "
                "compute in its cortex.yaml and deploy it again, or provide such a machine"
            )
        return earlier

    def stop_stored(self, record: JobRecord) -> None:
        """A stop of this job was stored by this operator: carry it out."""
        live = self.live_jobs.find(record.spec.job_id)
        if live is None:
            return
        live.stop_wanted = True
        if record.state in FINAL and not _ended_while_waiting(live, record):
            return
        self.live_jobs.update(live, record)
        if record.state in CLAIMED:
            self.engine.stop(live.job_id)

    def hints(self, api_id: str) -> list[str]:
        """Hints for the users of a version, as its latest job has shown them."""
        return list(self._hints.get(api_id, ()))

    def on_job_changed(self, job_id: str) -> None:
        """Another operator stored a job, or its stop."""
        self._refresher.request(job_id)

    def on_all_may_have_changed(self) -> None:
        """Other operators may have stored anything."""
        self._refresher.request_all([live.job_id for live in self.live_jobs.all()])

    def refresh(self, record: JobRecord) -> None:
        """Take in a job that was read from the store a moment ago."""
        live = self.live_jobs.find(record.spec.job_id)
        if record.spec.job_id in self._being_stored:
            self._notified_while_storing.add(record.spec.job_id)
        elif live is None:
            if record.state is State.WAITING:
                self._starter.add_waiting(record)
        elif record.state in FINAL:
            if _ended_while_waiting(live, record):
                self.live_jobs.update(live, record)
        elif record.wanted is Wanted.STOP and not live.stop_wanted:
            # The stop alone: in all else this operator's own writes may be newer.
            live.stop_wanted = True
            live.notify()
            if live.record.state in CLAIMED:
                self.engine.stop(live.job_id)

    def api_deployed(self, api: DeployedApi, before: DeployedApi | None) -> None:
        """See `CatalogueListener`."""
        self._starter.admission.limit(api.name, api.max_running)
        self._starter.schedule()

    def api_removed(self, name: str, api_ids: Collection[str]) -> None:
        """See `CatalogueListener`. The limit stays: else jobs whose stop is unread would start."""

    def observe(self, observation: Observation) -> None:
        """Take in an observation of the engine."""
        if self.background.is_closed:
            return
        if isinstance(observation, CapacityFreed):
            self._starter.schedule()
            return
        live = self.live_jobs.find(observation.job_id)
        is_known = live is not None and live.record.state in CLAIMED
        if live is None or not is_known or live.record.attempt != observation.attempt:
            log.warning("stale observation", observation=type(observation).__name__)
            return
        if isinstance(observation, Unreachable):
            live.unreachable = observation.reason
            live.notify()
            return
        live.unreachable = None
        match observation:
            case Waits():
                live.engine_wait = observation.reason
                live.notify()
            case Reachable():
                live.notify()
            case Started():
                self.background.run(self._started(live, observation))
            case Ended():
                self.background.run(self._ended(live, observation))
            case Lost():
                self.background.run(self._lost(live, observation))
            case NeverStarted():
                self.background.run(self._never_started(live, observation))

    def _job_changed(self, before: JobRecord, live: LiveJob) -> None:
        if self._on_change is not None:
            self._on_change(before, live.record)
        if live.record.state in FINAL:
            self._starter.release(live)
            if self._on_finished is not None:
                self._on_finished(live.record)

    async def _started(self, live: LiveJob, started: Started) -> None:
        await self.live_jobs.apply(live, events.Start(live.record.attempt, started.start_ns))

    async def _ended(self, live: LiveJob, ended: Ended) -> None:
        event, message = event_of(ended)
        message = self._store_hints(live, ended.hints, message)
        if event is Event.LOSE and await self._retried(live, message or ""):
            return
        result = json.dumps(ended.result) if ended.has_result and event is Event.SUCCEED else None
        record = await self.live_jobs.apply(
            live,
            events.End(
                event,
                live.record.attempt,
                ended.end_ns,
                message,
                start_ns=ended.start_ns,
                exit_code=ended.exit_code,
                result=result,
            ),
        )
        if record is not None and ended.measures and self._on_measures is not None:
            self._on_measures(record.spec.api_name, ended.measures)

    def _store_hints(
        self, live: LiveJob, hints: tuple[str, ...], message: str | None
    ) -> str | None:
        """Store the hints for the users of a version. The message of the first job with hints shows
        them, if it has no other message."""
        api_id = live.record.spec.api_id
        is_first = bool(hints) and api_id not in self._hints
        if hints or api_id in self._hints:
            self._hints[api_id] = hints
        return "; ".join(hints) if is_first and message is None else message

    async def _lost(self, live: LiveJob, lost: Lost) -> None:
        if lost.is_final or not await self._retried(live, lost.reason):
            await self.live_jobs.fail(live, lost.reason)

    async def _retried(self, live: LiveJob, reason: str) -> bool:
        """Retry a job whose attempt was lost, if its API allows another attempt. False where the
        loss ends the job."""
        if live.record.state not in CLAIMED:
            return True  # the loss was reported twice
        assert live.version is not None
        losses = live.record.losses
        if live.stop_wanted or live.is_overdue or losses >= live.version.api.retries:
            return False
        reason_text = f"attempt {losses + 1} was lost: {reason}"
        if await self.live_jobs.apply(live, events.Retry(live.record.attempt, reason_text)) is None:
            return live.record.wanted is Wanted.RUN  # False where a stop was stored in between
        log.warning("attempt lost", job=live.job_id, number=losses + 1, reason=reason)
        self._starter.release(live)
        if self._starter.watch_deadline(live):
            self._starter.enqueue(live)
        return True

    async def _never_started(self, live: LiveJob, never: NeverStarted) -> None:
        if live.stop_wanted:
            await self.live_jobs.fail(live, "stopped before it started")
            return
        if live.record.state is State.RUNNING:  # the job has removed its start record since
            await self._lost(live, Lost(never.job_id, never.attempt, "its start record is gone"))
            return
        # An attempt with a reason, such as a node that does not answer, waits for that alone.
        live.failed_starts += never.held_up_by is None
        failed = live.failed_starts
        if failed >= _MAX_FAILED_STARTS and never.held_up_by is None:
            await self.live_jobs.fail(live, f"{failed} attempts to start it failed")
            return
        record = await self.live_jobs.apply(live, events.Unclaim(live.record.attempt))
        if record is None:
            if live.record.wanted is Wanted.STOP:  # the stop was stored in between
                await self.live_jobs.fail(live, "stopped before it started")
            return
        self._starter.release(live)
        self._starter.watch_deadline(live)
        if never.held_up_by is not None:
            self._starter.enqueue_later(live, never.held_up_by)
            return
        # Whatever ended the fork server was not this job's fault, and may be over soon.
        delay_s = min(_MAX_RETRY_DELAY_S, 0.05 * 2 ** min(failed - 1, 10)) if failed > 1 else 0
        asyncio.get_running_loop().call_later(delay_s, self._starter.enqueue, live)


def _ended_while_waiting(live: LiveJob, record: JobRecord) -> bool:
    """Whether a job that the store holds as ended has ended without another attempt: a user has
    stopped it while it waited.

    Only the leader ends attempts. If this operator does not know the end of one, another operator
    leads by now, and has the whole log.
    """
    # The write by which the job waits again may not have returned yet.
    has_waited = live.record.state is State.WAITING or record.state is State.CANCELLED
    return has_waited and live.record.attempt == record.attempt


def event_of(ended: Ended) -> tuple[Event, str | None]:
    """The event of an observed end, and the message of the job."""
    match ended.ending:
        case Ending.EXITED:
            return (Event.SUCCEED if ended.exit_code == 0 else Event.FAIL), ended.message
        case Ending.OUT_OF_MEMORY:
            return Event.OUT_OF_MEMORY, ended.message
        case Ending.TIMED_OUT:
            return Event.TIME_OUT, ended.message
        case Ending.STOPPED:
            # The store knows whether a user stopped the job, and then shows it as stopped after any
            # event. Only a job that no user has stopped shows this message.
            return Event.LOSE, "something other than the operator stopped its supervising process"
