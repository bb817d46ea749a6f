"""The dispatcher joins store and engine: it moves every job from what is observed to what is wanted.

It keeps in memory only what the store already holds, so a restart is nothing special: `open` reads
the unfinished jobs and goes on. Where other operators store jobs and stops as well, it is told of them
(`news`). Jobs that wait are the queue's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress

import structlog

from cortex.engines.base import (
    CapacityFreed,
    Ended,
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
from cortex.operator.deploy.versions import Versions
from cortex.operator.dispatch.admission import Admission, attempt
from cortex.operator.dispatch.live_job import LiveJob, meaning
from cortex.operator.dispatch.live_jobs import LiveJobs
from cortex.operator.dispatch.refresh import Refresher
from cortex.spec.api import ApiSpec
from cortex.spec.audit import Actor
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import CLAIMED, FINAL, Event, State, Wanted
from cortex.spec.times import now_ns
from cortex.store import Facts, Outcome, Replay, Store

log = structlog.get_logger()

_MAX_ATTEMPTS = 50  # before the engine counts as refusing: about seven minutes, with the pauses
_LONGEST_PAUSE_S = 10.0


class Dispatcher:
    """One per operator. All methods are called on the event loop."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        versions: Versions,
        folders: JobFolders,
        finished: Callable[[str], None] | None = None,
        changed: Callable[[JobRecord, JobRecord], None] | None = None,
        measured: Callable[[str, tuple[object, ...]], None] | None = None,
    ) -> None:
        """For `finished` and `changed` see `LiveJobs`.

        Args:
            measured: told of what the task of a job that has ended counted and measured, and of which API it is.
        """
        self._measured = measured
        self._store = store
        self._engine = engine
        self._versions = versions
        self._board = LiveJobs(store, finished, changed)
        self._queue = Admission(self._board, engine, versions, folders)
        self._news = Refresher(store, self.heard)
        self._being_stored: set[str] = set()
        self._told_early: set[str] = set()  # of those: something was told of them
        self._hints: dict[str, tuple[str, ...]] = {}  # by version

    async def open(self) -> None:
        """Take up every job that an earlier operator left unfinished."""
        for deployment in await self._store.deployments():
            self.deployed(deployment.spec)
        unfinished = await self._store.jobs_in_progress()
        waiting = [record for record in unfinished if record.state is State.WAITING]
        for record in unfinished:
            if record.state is State.WAITING:
                continue
            live = LiveJob(record, stop_wanted=record.wanted is Wanted.STOP)
            live.version = await self._versions.describe(record.spec.api_id)
            self._board.live[record.spec.job_id] = live
            self._queue.line.occupy(record.spec.api_name, record.spec.job_id)
            await self._engine.recover(attempt(live, record.spec))
            if live.stop_wanted:
                self._engine.stop(record.spec.job_id)
        for record in waiting:  # last: what they may take is known once all others have theirs
            self._queue.take_up(record)
        self._news.open()

    async def close(self) -> None:
        """Stop driving; jobs that have started go on. Submits that are being stored are answered."""
        await self._board.close()
        await self._news.close()

    async def submit(self, draft: JobSpec, replay: Replay | None) -> JobRecord:
        """Store a job, and see to it. One that can start now is claimed in the same commit.

        Raises:
            NotFound, Conflict, OverLimit, StorageUnavailable, Superseded: as `Store.submit` does.
        """
        # The server lets a request end, also where the client has hung up: what is stored is driven.
        is_likely = replay is None and not self._being_stored
        claim = self._queue.claim_ahead(draft, prepare=is_likely)
        is_new = is_claimed = is_refused = False
        self._queue.storing(claim)
        self._being_stored.add(draft.job_id)
        try:
            record, is_new = await self._store.submit(draft, replay, claim)
            is_claimed = is_new and record.state is State.STARTING
            is_refused = not is_new
        except (NotFound, Conflict, OverLimit):
            is_refused = True
            raise
        except Superseded:
            raise  # the job is going to be stored without a claim
        except StorageUnavailable:
            # Of a file on a disk that fails, nobody can tell what is found after a crash.
            is_refused = self._store.is_shared
            raise
        finally:
            self._being_stored.discard(draft.job_id)
            self._queue.stored(draft, claim, is_claimed=is_claimed, is_refused=is_refused)
        if not is_new or self._board.is_closed:
            return record
        if draft.job_id in self._told_early:
            self._told_early.discard(draft.job_id)
            self.news(draft.job_id)
        if is_claimed:
            self._queue.start(record)
        else:
            self._queue.take_up(record)
        return record

    def deployed(self, spec: ApiSpec) -> None:
        """This is the current version of its API from now on."""
        self._versions.deployed(spec.name, spec.api_id)
        self._queue.line.limit(spec.name, spec.limits.max_running)
        self._queue.pump()

    async def stop(self, job_id: str, actor: Actor) -> Outcome:
        """Stop a job: durable when this returns. Not taken: it is unknown, had completed, or was
        stopped before."""
        facts: Facts = {"end_ns": now_ns(), "message": "stopped by a user"}
        outcome = await self._store.apply(job_id, Event.STOP, facts, actor=actor)
        if outcome.taken and outcome.job is not None:
            self.stopped(outcome.job)
        return outcome

    def stopped(self, record: JobRecord) -> None:
        """A stop was stored: carry it out."""
        live = self._board.live.get(record.spec.job_id)
        if live is None:
            return
        live.stop_wanted = True
        self._board.see(live, record)
        if record.state in CLAIMED:
            self._engine.stop(record.spec.job_id)

    # What other operators store

    def news(self, job_id: str) -> None:
        """Another operator stored a job, or that it is stopped."""
        self._news.tell(job_id)

    def all_news(self) -> None:
        """Others may have stored anything."""
        self._news.tell_all(list(self._board.live))

    def heard(self, record: JobRecord) -> None:
        """A job as it was stored a moment ago."""
        job_id = record.spec.job_id
        live = self._board.live.get(job_id)
        if job_id in self._being_stored:
            self._told_early.add(job_id)
        elif live is None:
            if record.state is State.WAITING:
                self._queue.take_up(record)
        elif record.state in FINAL:
            self._board.see(live, record)
        elif record.wanted is Wanted.STOP and not live.stop_wanted:
            # Nothing else is taken from it: what this operator stored itself may be newer.
            live.stop_wanted = True
            live.changed()
            if live.record.state in CLAIMED:
                self._engine.stop(job_id)

    # What clients ask

    def live(self) -> list[LiveJob]:
        """All jobs in progress."""
        return list(self._board.live.values())

    def in_progress(self, job_id: str) -> bool:
        """Whether the end of a job's processes has not been seen yet."""
        return job_id in self._board.live

    def unreachable(self, job_id: str) -> str | None:
        """Why the engine cannot be asked after a job right now, if so."""
        live = self._board.live.get(job_id)
        return None if live is None else live.unreachable

    def why_waiting(self, job_id: str) -> str | None:
        """What a waiting job waits for, in words."""
        live = self._board.live.get(job_id)
        return None if live is None else self._queue.why_waiting(live)

    def hints(self, api_id: str) -> list[str]:
        """What the users of a version should know, as its latest job has shown it."""
        return list(self._hints.get(api_id, ()))

    def record(self, job_id: str) -> JobRecord | None:
        """A job in progress, as it was stored last; None for any other."""
        live = self._board.live.get(job_id)
        return None if live is None else live.record

    async def next(self, job_id: str, within_s: float) -> JobRecord | None:
        """A job in progress after its next change that shows, or as it is when the time is over;
        None, at once, for one that is not in progress."""
        live = self._board.live.get(job_id)
        if live is None:
            return None
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await live.change()
        return live.record

    async def change(self, job_id: str) -> None:
        """Return when the job changes in any way that shows, or at once if it is not in progress."""
        live = self._board.live.get(job_id)
        if live is not None:
            await live.change()

    # Observations

    def observed(self, observation: Observation) -> None:
        """What the engine reports."""
        if self._board.is_closed:
            return
        if isinstance(observation, CapacityFreed):
            self._queue.pump()
            return
        live = self._board.live.get(observation.job_id)
        is_known = live is not None and live.record.state in CLAIMED
        if live is None or not is_known or live.record.attempt != observation.attempt:
            log.warning("stale observation", observation=type(observation).__name__)
            return
        if isinstance(observation, Unreachable):
            live.unreachable = observation.reason
            live.changed()
            return
        live.unreachable = None
        if isinstance(observation, Waits):
            live.waits_for = observation.reason
            live.changed()
            return
        match observation:
            case Started():
                self._board.tasks.run(self._started(live, observation))
            case Ended():
                self._board.tasks.run(self._ended(live, observation))
            case Lost():
                self._board.tasks.run(self._lost(live, observation))
            case NeverStarted():
                self._board.tasks.run(self._never_started(live, observation))
            case Reachable():
                live.changed()

    async def _started(self, live: LiveJob, seen: Started) -> None:
        await self._board.apply(live, Event.START, {"start_ns": seen.start_ns})

    async def _ended(self, live: LiveJob, seen: Ended) -> None:
        event, message = meaning(seen)
        message = self._advise(live, seen.hints, message)
        if event is Event.LOSE and await self._tried_again(live, message or ""):
            return
        result = json.dumps(seen.result) if seen.has_result and event is Event.SUCCEED else None
        record = await self._board.apply(
            live,
            event,
            {
                "start_ns": seen.start_ns,
                "end_ns": seen.end_ns,
                "message": message,
                "exit_code": seen.exit_code,
                "result": result,
            },
        )
        if record is not None and seen.measures and self._measured is not None:
            self._measured(record.spec.api_name, seen.measures)

    def _advise(self, live: LiveJob, hints: tuple[str, ...], message: str | None) -> str | None:
        """Keep what the users of its version should know; the first job that shows it and has nothing else to
        say tells them."""
        api_id = live.record.spec.api_id
        is_first = bool(hints) and api_id not in self._hints
        if hints or api_id in self._hints:
            self._hints[api_id] = hints
        return "; ".join(hints) if is_first and message is None else message

    async def _lost(self, live: LiveJob, seen: Lost) -> None:
        if seen.is_final or not await self._tried_again(live, seen.reason):
            await self._board.lose(live, seen.reason)

    async def _tried_again(self, live: LiveJob, reason: str) -> bool:
        """Let a job whose attempt was lost wait for another, if its API allows that; False where this
        is its end."""
        if live.record.state not in CLAIMED:
            return True  # it was told twice
        assert live.version is not None
        losses = live.record.losses
        if live.stop_wanted or live.is_overdue or losses >= live.version.api.retries:
            return False
        words = f"attempt {losses + 1} was lost: {reason}"
        if await self._board.apply(live, Event.RETRY, {"message": words}) is None:
            return live.record.wanted is Wanted.RUN  # a stop came in between, or it was told twice
        log.warning("attempt lost", job=live.record.spec.job_id, number=losses + 1, reason=reason)
        self._queue.vacate(live)
        if self._queue.watch_deadline(live):
            self._queue.queue_up(live)
        return True

    async def _never_started(self, live: LiveJob, seen: NeverStarted) -> None:
        if live.stop_wanted:
            await self._board.lose(live, "stopped before it started")
            return
        if live.record.state is State.RUNNING:  # the job has removed its start record since
            await self._lost(live, Lost(seen.job_id, seen.attempt, "its start record is gone"))
            return
        attempts = live.fruitless
        if attempts >= _MAX_ATTEMPTS and seen.held_up_by is None:
            await self._board.lose(live, f"{attempts} attempts to start it failed")
            return
        record = await self._board.apply(live, Event.UNCLAIM, {})
        if record is None:
            if live.record.wanted is Wanted.STOP:  # it came in between
                await self._board.lose(live, "stopped before it started")
            return
        self._queue.vacate(live)
        self._queue.watch_deadline(live)
        if seen.held_up_by is not None:
            self._queue.try_again(live, seen.held_up_by)
            return
        # Whatever ended the fork server was not this job's doing, and may be over soon.
        pause_s = min(_LONGEST_PAUSE_S, 0.05 * 2 ** min(attempts - 1, 10)) if attempts > 1 else 0
        asyncio.get_running_loop().call_later(pause_s, self._queue.queue_up, live)
