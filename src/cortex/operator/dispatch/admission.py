"""The jobs that wait, and their starts: first in, first out. A job joins the line when its environment is
built, and the first that does not fit holds those behind it, so none is starved. Only jobs of an API that
runs as many as it may are passed by. Used by the dispatcher alone.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from cortex.engines.base import Attempt, Engine
from cortex.errors import StorageUnavailable
from cortex.joblog.folders import JobFolders
from cortex.operator.deploy.versions import HeldUp, Unusable, Versions
from cortex.operator.dispatch.line import WaitingQueue
from cortex.operator.dispatch.live_job import LiveJob, ending
from cortex.operator.dispatch.live_jobs import STORAGE_RETRY_S, LiveJobs
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import Event, State
from cortex.spec.times import now_ns
from cortex.store import InitialClaim

log = structlog.get_logger()

_LAID_OUT_S = 5.0  # after which whoever has laid out a folder ahead has seen that it need not be


@dataclass
class _Unready:
    """Jobs whose version is being made ready, by their ids."""

    jobs: dict[str, LiveJob] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class Admission:
    """All methods are called on the event loop."""

    def __init__(
        self, board: LiveJobs, engine: Engine, versions: Versions, folders: JobFolders
    ) -> None:
        self.line = WaitingQueue()
        self._board = board
        self._engine = engine
        self._versions = versions
        self._folders = folders
        self._blocked_by: str | None = None
        self._unplaced = 0  # jobs that are being stored, and are going to wait in the line
        self._unready: dict[str, _Unready] = {}  # by the version's id
        board.over = self.vacate

    def take_up(self, record: JobRecord) -> None:
        """A job that waits. Its config stays in the store until it starts, if it is long."""
        live = LiveJob(record.without_long_config())
        self._board.live[record.spec.job_id] = live
        if self.watch_deadline(live):
            self.queue_up(live)

    def start(self, record: JobRecord) -> None:
        """A job that was claimed as it was stored."""
        live = LiveJob(record.without_long_config())
        self._board.live[record.spec.job_id] = live
        live.version = self._versions.ready(record.spec.api_id)
        self._set_deadline(live)
        self._engine.start(attempt(live, record.spec))

    def claim_ahead(self, draft: JobSpec, *, prepare: bool) -> InitialClaim | None:
        """A place and a handle for a job that is about to be stored, if nobody waits before it and
        all that it needs is there.

        Args:
            prepare: whether to use the time that it takes to store it: it is going to be, most likely,
                and no other is now.
        """
        version = self._versions.ready_for(draft.api_name)
        if version is None or self._unplaced or self.line.first() is not None:
            return None
        compute = version.api.compute
        if (
            self.line.full(draft.api_name) is not None
            or self._engine.ledger.refusal(compute) is not None
        ):
            return None
        if self._engine.ledger.reserve(draft.job_id, compute) is not None:
            return None
        try:
            handle = self._engine.claim(draft.job_id, 1)
        except OSError:  # the job waits until its folder can be made, and says so
            self._engine.ledger.release(draft.job_id)
            return None
        self.line.occupy(draft.api_name, draft.job_id)
        if prepare:
            spec = replace(draft, api_id=version.api.api_id)
            self._engine.prepare(Attempt(spec, version, 1, handle, _deadline(spec)))
        return InitialClaim(version.api.api_id, handle)

    def storing(self, claim: InitialClaim | None) -> None:
        """A job is about to be stored, with this claim."""
        self._unplaced += int(claim is None)

    def stored(
        self, draft: JobSpec, claim: InitialClaim | None, *, is_claimed: bool, is_refused: bool
    ) -> None:
        """It was, or was not; a claim that was not made is given back.

        Args:
            is_refused: whether it is certain that there is no such job.
        """
        self._unplaced -= int(claim is None)
        if claim is not None and not is_claimed:
            self._engine.ledger.release(draft.job_id)
            self.line.vacate(draft.api_name, draft.job_id)
            if is_refused:
                self._remove(self._folders.folder(draft.job_id))
            self.pump()

    def why_waiting(self, live: LiveJob) -> str | None:
        """What a waiting job waits for, in words."""
        if live.record.state is State.STARTING:
            return live.waits_for
        if live.record.state is not State.WAITING:
            return None
        if live.held_up_by is not None:
            return f"it is tried again until this is over: {live.held_up_by}"
        if live.version is None:
            return "its environment is being built"
        if attempts := live.fruitless:
            return f"{attempts} attempts to start it came to nothing; it is tried again"
        return self._why_in_line(live)

    def queue_up(self, live: LiveJob) -> None:
        """Let a waiting job join the line, once its version is ready."""
        if live.record.state is not State.WAITING or self._board.is_closed:
            return
        api_id = live.record.spec.api_id
        live.version = self._versions.ready(api_id)
        if live.version is not None:
            self._enqueue(live)
            return
        unready = self._unready.get(api_id)
        if unready is None:  # one looks after it for all of them, who may be very many
            unready = self._unready[api_id] = _Unready()
            self._board.tasks.run(self._enqueue_when_ready(api_id, unready))
        unready.jobs[live.record.spec.job_id] = live

    def watch_deadline(self, live: LiveJob) -> bool:
        """Time a waiting job out when its deadline comes; False if that is now."""
        self._set_deadline(live)
        if live.deadline is None:
            return True
        left_s = live.deadline - time.monotonic()
        if left_s <= 0:
            self._deadline_passed(live)
            return False
        loop = asyncio.get_running_loop()
        live.timer = loop.call_later(left_s, self._deadline_passed, live)
        return True

    def try_again(self, live: LiveJob, held_up_by: str) -> None:
        """Let a waiting job wait for what the machine lacks, for as long as that takes."""
        if live.held_up_by != held_up_by:
            log.warning("job held up", job=live.record.spec.job_id, reason=held_up_by)
            live.held_up_by = held_up_by
            live.changed()
        asyncio.get_running_loop().call_later(STORAGE_RETRY_S, self.queue_up, live)

    def vacate(self, live: LiveJob) -> None:
        """A job gives back its place, if it has one."""
        job_id = live.record.spec.job_id
        if live.version is None:
            self._leave_unready(live)
        had_place = self.line.vacate(live.record.spec.api_name, job_id)
        if had_place or self.line.first() == job_id:  # else nobody gets on by it
            self.pump()

    def pump(self) -> None:
        """Start whoever can start now."""
        while not self._board.is_closed and (job_id := self.line.first()) is not None:
            live = self._board.live.get(job_id)
            if live is None or live.record.state is not State.WAITING or live.version is None:
                self.line.leave()
                continue
            api_name, compute = live.record.spec.api_name, live.version.api.compute
            if self.line.full(api_name) is not None:
                self.line.step_aside()
                continue
            refusal = self._engine.ledger.refusal(compute)
            if refusal is None:
                self._blocked_by = self._engine.ledger.reserve(job_id, compute)
                if self._blocked_by is not None:
                    return
            if refusal is None:
                self.line.occupy(api_name, job_id)
            self.line.leave()
            if refusal is None:
                self._board.tasks.run(self._launch(live))
            else:
                self._board.tasks.run(self._board.lose(live, refusal))
        self._blocked_by = None

    def _leave_unready(self, live: LiveJob) -> None:
        api_id = live.record.spec.api_id
        unready = self._unready.get(api_id)
        if unready is None or unready.jobs.pop(live.record.spec.job_id, None) is None:
            return
        if not unready.jobs:  # no job waits for its build any more
            del self._unready[api_id]
            if unready.task is not None:
                unready.task.cancel()

    async def _enqueue_when_ready(self, api_id: str, unready: _Unready) -> None:
        unready.task = asyncio.current_task()
        if not unready.jobs:
            return
        version = output = None
        try:
            version = await self._versions.prepare(api_id)
        except (HeldUp, StorageUnavailable) as error:
            for live in self._unready.pop(api_id).jobs.values():
                self.try_again(live, str(error))
            return
        except Unusable as error:
            reason, output = error.reason, error.output
        except Exception as error:  # nobody would ever take the jobs up again
            log.error("a version could not be made ready", api_id=api_id, exc_info=error)
            reason = "an error of the operator; its log has the details"
        for live in self._unready.pop(api_id).jobs.values():
            if version is None:
                self._board.tasks.run(self._lose_unready(live, reason, output))
                continue
            live.version = version
            live.changed()
            self._enqueue(live)

    async def _lose_unready(self, live: LiveJob, reason: str, output: str | None) -> None:
        job_id = live.record.spec.job_id
        if output is not None:
            try:
                self._folders.append_to_log(job_id, output)
            except OSError as failed:
                log.warning("the log of a job cannot be written", job=job_id, error=str(failed))
        await self._board.lose(live, reason)

    def _enqueue(self, live: LiveJob) -> None:
        if live.record.state is State.WAITING:
            spec = live.record.spec
            self.line.join(live.record.seq, spec.job_id, spec.api_name)
            # Behind one who is held up nothing has changed.
            if self._blocked_by is None or self.line.first() == spec.job_id:
                self.pump()

    async def _launch(self, live: LiveJob) -> None:
        job_id, number = live.record.spec.job_id, live.record.attempt + 1
        try:
            handle = self._engine.claim(job_id, number)
        except OSError as error:
            self._engine.ledger.release(job_id)
            self.vacate(live)
            self.try_again(live, f"the job's folder cannot be made: {error}")
            return
        record = await self._board.apply(live, Event.CLAIM, {"handle": handle})
        if record is None:  # stopped or timed out in between
            self._engine.ledger.release(job_id)
            self.vacate(live)
            return
        live.held_up_by = None
        if live.timer is not None:
            live.timer.cancel()  # from here on the supervisor watches it
        if live.stop_wanted:
            self._engine.ledger.release(job_id)
            await self._board.lose(live, "stopped before it started")
            return
        self._engine.start(attempt(live, record.spec))

    def _remove(self, folder: Path) -> None:
        """The folder of a job that there never was: retention would never know of it."""
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:  # it was laid out ahead, or is at this moment
            self._board.tasks.run(_remove_later(folder))

    def _set_deadline(self, live: LiveJob) -> None:
        if live.deadline is None:  # from here on the wall clock may be set as it may
            live.deadline = _deadline(live.record.spec)

    def _deadline_passed(self, live: LiveJob) -> None:
        self._board.tasks.run(self._time_out_waiting(live))

    async def _time_out_waiting(self, live: LiveJob) -> None:
        if live.record.state is State.WAITING:
            message = f"timeout of {live.record.spec.timeout} s passed while it waited"
            await self._board.apply(live, Event.TIME_OUT, ending(message=message))

    def _why_in_line(self, live: LiveJob) -> str | None:
        running = self.line.full(live.record.spec.api_name)
        if running is not None:
            return f"as many jobs of this API run as its limits.max_running allows, {running}"
        if self._blocked_by is not None and self.line.first() != live.record.spec.job_id:
            return f"waits behind earlier jobs, the first of which {self._blocked_by}"
        return self._blocked_by


async def _remove_later(folder: Path) -> None:
    await asyncio.sleep(_LAID_OUT_S)
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _deadline(spec: JobSpec) -> float | None:
    deadline_ns = spec.deadline_ns
    return None if deadline_ns is None else time.monotonic() + (deadline_ns - now_ns()) / 1e9


def attempt(live: LiveJob, spec: JobSpec) -> Attempt:
    """What an engine is told of a job that was claimed; the spec with its config, if it is to be started."""
    assert live.version is not None and live.record.handle is not None
    return Attempt(
        spec,
        live.version,
        live.record.attempt,
        live.record.handle,
        live.deadline,
        live.record.losses,
        live.record.message if live.record.losses else None,
    )
