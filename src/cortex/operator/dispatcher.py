"""The dispatcher joins store and engine: it moves every job from what is observed to what is wanted.

It keeps in memory only what the store already holds, so a restart is nothing special: `open` reads
the unfinished jobs and goes on. Jobs wait first in, first out; a job joins the queue when its
environment is built, and the first that does not fit holds those behind it, so none is starved.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field

import structlog

from cortex.engines.base import (
    Attempt,
    CapacityFreed,
    Ended,
    Ending,
    Engine,
    Lost,
    NeverStarted,
    Observation,
    Started,
    Unreachable,
    Version,
)
from cortex.errors import StorageUnavailable
from cortex.operator.versions import Unusable, Versions
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import CLAIMED, FINAL, Event, State, Wanted
from cortex.spec.times import now_ns
from cortex.store import Facts, Outcome, Store

log = structlog.get_logger()

_STORAGE_RETRY_S = 1.0
_MAX_ATTEMPTS = 50  # before the engine counts as refusing: about seven minutes, with the pauses
_LONGEST_PAUSE_S = 10.0


@dataclass
class _Live:
    """A job in progress."""

    record: JobRecord
    version: Version | None = None
    stop_wanted: bool = False
    unreachable: str | None = None
    deadline: asyncio.TimerHandle | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Dispatcher:
    """One per operator. All methods are called on the event loop."""

    def __init__(self, store: Store, engine: Engine, versions: Versions) -> None:
        self._store = store
        self._engine = engine
        self._versions = versions
        self._live: dict[str, _Live] = {}
        self._queue: list[tuple[int, str]] = []  # a heap by seq
        self._blocked_by: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Take up every job that an earlier operator left unfinished."""
        for record in await self._store.jobs_in_progress():
            if record.state is State.WAITING:
                self.submitted(record)
                continue
            live = _Live(record, stop_wanted=record.wanted is Wanted.STOP)
            live.version = await self._versions.describe(record.spec.api_id)
            self._live[record.spec.job_id] = live
            await self._engine.recover(self._attempt(live))
            if live.stop_wanted:
                self._engine.stop(record.spec.job_id)

    async def close(self) -> None:
        """Stop driving; jobs that have started go on."""
        for live in self._live.values():
            if live.deadline is not None:
                live.deadline.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def submitted(self, record: JobRecord) -> None:
        """A job was stored, waiting."""
        live = _Live(record)
        self._live[record.spec.job_id] = live
        if self._watch_deadline(live):
            self._queue_up(live)

    async def stop(self, job_id: str) -> Outcome:
        """Stop a job: durable when this returns. Not taken: it is unknown, had completed, or was
        stopped before."""
        outcome = await self._store.apply(
            job_id, Event.STOP, {"end_ns": now_ns(), "message": "stopped by a user"}
        )
        if outcome.taken and outcome.job is not None:
            self.stopped(outcome.job)
        return outcome

    def stopped(self, record: JobRecord) -> None:
        """A stop was stored: carry it out."""
        live = self._live.get(record.spec.job_id)
        if live is None:
            return
        live.stop_wanted = True
        self._see(live, record)
        if record.state in CLAIMED:
            self._engine.stop(record.spec.job_id)

    def in_progress(self, job_id: str) -> bool:
        """Whether the end of a job's processes has not been seen yet."""
        return job_id in self._live

    def unreachable(self, job_id: str) -> str | None:
        """Why the engine cannot be asked after a job right now, if so."""
        live = self._live.get(job_id)
        return None if live is None else live.unreachable

    def why_waiting(self, job_id: str) -> str | None:
        """What a waiting job waits for, in words."""
        live = self._live.get(job_id)
        if live is None or live.record.state is not State.WAITING:
            return None
        if live.version is None:
            return "its environment is being built"
        if live.record.attempt:
            return f"{live.record.attempt} attempts to start it came to nothing; it is tried again"
        if self._queue and self._queue[0][1] != job_id and self._blocked_by is not None:
            return f"waits behind earlier jobs, the first of which {self._blocked_by}"
        return self._blocked_by

    async def change(self, job_id: str) -> None:
        """Return when the job changes in any way that shows, or at once if it is not in progress."""
        live = self._live.get(job_id)
        if live is not None:
            await live.changed.wait()

    # The queue

    def _queue_up(self, live: _Live) -> None:
        live.version = self._versions.ready(live.record.spec.api_id)
        if live.version is None:
            self._spawn(self._enqueue_when_ready(live))
        else:
            self._enqueue(live)

    async def _enqueue_when_ready(self, live: _Live) -> None:
        try:
            live.version = await self._versions.prepare(live.record.spec.api_id)
        except Unusable as error:
            self._engine.note(live.record.spec.job_id, error.output)
            await self._lose(live, error.reason)
            return
        self._changed(live)
        self._enqueue(live)

    def _enqueue(self, live: _Live) -> None:
        if live.record.state is State.WAITING:
            heapq.heappush(self._queue, (live.record.seq, live.record.spec.job_id))
            self._pump()

    def _pump(self) -> None:
        while self._queue:
            _, job_id = self._queue[0]
            live = self._live.get(job_id)
            if live is None or live.record.state is not State.WAITING or live.version is None:
                heapq.heappop(self._queue)
                continue
            compute = live.version.api.compute
            refusal = self._engine.refusal(compute)
            if refusal is None:
                self._blocked_by = self._engine.reserve(job_id, compute)
                if self._blocked_by is not None:
                    return
            heapq.heappop(self._queue)
            if refusal is None:
                self._spawn(self._launch(live))
            else:
                self._spawn(self._lose(live, refusal))
        self._blocked_by = None

    async def _launch(self, live: _Live) -> None:
        job_id, number = live.record.spec.job_id, live.record.attempt + 1
        handle = self._engine.claim(job_id, number)
        record = await self._apply(live, Event.CLAIM, {"handle": handle})
        if record is None:  # stopped or timed out in between
            self._engine.release(job_id)
            return
        if live.deadline is not None:
            live.deadline.cancel()  # from here on the supervisor watches it
        if live.stop_wanted:
            self._engine.release(job_id)
            await self._lose(live, "stopped before it started")
            return
        await self._engine.start(self._attempt(live))

    def _watch_deadline(self, live: _Live) -> bool:
        """Time a waiting job out when its deadline comes; False if that is now."""
        deadline_ns = live.record.spec.deadline_ns
        if deadline_ns is None:
            return True
        left_s = (deadline_ns - now_ns()) / 1e9
        if left_s <= 0:
            self._deadline_passed(live)
            return False
        loop = asyncio.get_running_loop()
        live.deadline = loop.call_later(left_s, self._deadline_passed, live)
        return True

    def _deadline_passed(self, live: _Live) -> None:
        self._spawn(self._time_out_waiting(live))

    async def _time_out_waiting(self, live: _Live) -> None:
        if live.record.state is State.WAITING:
            message = f"timeout of {live.record.spec.timeout} s passed while it waited"
            await self._apply(live, Event.TIME_OUT, _ending(message=message))

    # Observations

    def observed(self, observation: Observation) -> None:
        """What the engine reports."""
        if isinstance(observation, CapacityFreed):
            self._pump()
            return
        live = self._live.get(observation.job_id)
        if live is None or live.record.attempt != observation.attempt:
            log.warning("stale observation", observation=type(observation).__name__)
            return
        if isinstance(observation, Unreachable):
            live.unreachable = observation.reason
            self._changed(live)
            return
        live.unreachable = None
        match observation:
            case Started():
                self._spawn(self._started(live, observation))
            case Ended():
                self._spawn(self._ended(live, observation))
            case Lost():
                self._spawn(self._lose(live, observation.reason))
            case NeverStarted():
                self._spawn(self._never_started(live))

    async def _started(self, live: _Live, seen: Started) -> None:
        await self._apply(live, Event.START, {"start_ns": seen.start_ns})

    async def _ended(self, live: _Live, seen: Ended) -> None:
        event, message = _meaning(seen)
        result = json.dumps(seen.result) if seen.has_result and event is Event.SUCCEED else None
        await self._apply(
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

    async def _never_started(self, live: _Live) -> None:
        if live.stop_wanted:
            await self._lose(live, "stopped before it started")
            return
        attempts = live.record.attempt
        if attempts >= _MAX_ATTEMPTS:
            await self._lose(live, f"{attempts} attempts to start it failed")
            return
        record = await self._apply(live, Event.UNCLAIM, {})
        if record is None:  # a stop came in between
            await self._lose(live, "stopped before it started")
            return
        # Whatever ended the fork server was not this job's doing, and may be over soon.
        self._watch_deadline(live)
        pause_s = min(_LONGEST_PAUSE_S, 0.05 * 2 ** (attempts - 1)) if attempts > 1 else 0
        asyncio.get_running_loop().call_later(pause_s, self._queue_up, live)

    async def _lose(self, live: _Live, reason: str) -> None:
        await self._apply(live, Event.LOSE, _ending(message=reason))

    # The store

    async def _apply(self, live: _Live, event: Event, facts: Facts) -> JobRecord | None:
        """Take an event of the job's current attempt, and wait for a store that takes no writes;
        the job after it, or None where it was not taken."""
        job_id = live.record.spec.job_id
        facts = {"of_attempt": live.record.attempt, **facts}
        while True:
            try:
                outcome = await self._store.apply(job_id, event, facts)
                break
            except StorageUnavailable as error:
                log.error("store unavailable", job=job_id, event=event.value, error=error.message)
                await asyncio.sleep(_STORAGE_RETRY_S)
        if outcome.job is not None:
            self._see(live, outcome.job)
        return outcome.job if outcome.taken else None

    def _see(self, live: _Live, record: JobRecord) -> None:
        live.record = record
        if record.state in FINAL:
            self._live.pop(record.spec.job_id, None)
            if live.deadline is not None:
                live.deadline.cancel()
            self._pump()
        self._changed(live)

    def _changed(self, live: _Live) -> None:
        live.changed.set()
        live.changed = asyncio.Event()

    def _attempt(self, live: _Live) -> Attempt:
        assert live.version is not None and live.record.handle is not None
        return Attempt(live.record.spec, live.version, live.record.attempt, live.record.handle)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("dispatcher failed", exc_info=error)


def _ending(message: str) -> Facts:
    """The facts of an ending without a worker."""
    return {
        "start_ns": None,
        "end_ns": now_ns(),
        "message": message,
        "exit_code": None,
        "result": None,
    }


def _meaning(seen: Ended) -> tuple[Event, str | None]:
    match seen.ending:
        case Ending.EXITED:
            return (Event.SUCCEED if seen.exit_code == 0 else Event.FAIL), seen.message
        case Ending.OUT_OF_MEMORY:
            return Event.OUT_OF_MEMORY, seen.message
        case Ending.TIMED_OUT:
            return Event.TIME_OUT, seen.message
        case Ending.STOPPED:
            # The store knows what its user wants: a job that was stopped is shown so whatever the
            # event. Only one that nobody stopped gets here with anything to say.
            return Event.LOSE, "something other than the operator stopped its supervising process"
