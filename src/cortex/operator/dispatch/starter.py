"""Brings a waiting job to its start: makes its version ready, puts it into the queue, claims it,
and has the engine start it. Carries out the decisions of `Admission`. Used by the dispatcher alone.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import replace
from pathlib import Path

import structlog

from cortex.engines.base import Attempt, Engine, Version
from cortex.joblog.folders import JobFolders
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.versions import VersionBlocked, Versions
from cortex.operator.dispatch.admission import Admission
from cortex.operator.dispatch.awaited_versions import AwaitedVersions, VersionResult
from cortex.operator.dispatch.line import Refuse, Start
from cortex.operator.dispatch.live_jobs import (
    STORAGE_RETRY_S,
    LiveJob,
    LiveJobs,
    platform_end,
)
from cortex.spec.api import Compute
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import Event, State
from cortex.spec.times import now_ns
from cortex.store import InitialClaim
from cortex.store.events import Claim
from cortex.system.background import Background

log = structlog.get_logger()

# For a supervisor that may still be preparing the folder of a cancelled claim.
_FOLDER_GRACE_S = 5.0
_DEMAND_INTERVAL_S = 1.0
_MAX_DEMAND = 300


class Starter:
    """All methods are called on the event loop."""

    def __init__(
        self,
        live_jobs: LiveJobs,
        engine: Engine,
        versions: Versions,
        catalogue: Catalogue,
        folders: JobFolders,
        background: Background,
    ) -> None:
        self.admission = Admission(live_jobs, engine.ledger)
        self._live_jobs = live_jobs
        self._engine = engine
        self._versions = versions
        self._catalogue = catalogue
        self._folders = folders
        self._background = background
        self._demand: list[Compute] = []
        self._demand_timer: asyncio.TimerHandle | None = None
        self._awaited = AwaitedVersions(versions, background, self._version_resolved)

    def add_waiting(self, record: JobRecord) -> None:
        """Add a job that waits."""
        live = self._live_jobs.add(record, self.admission.why_waiting)
        if self.watch_deadline(live):
            self.enqueue(live)

    def enqueue(self, live: LiveJob) -> None:
        """Let a waiting job join the queue once its version is ready."""
        if live.record.state is not State.WAITING or self._background.is_closed:
            return
        live.version = self._versions.ready(live.record.spec.api_id)
        if live.version is None:
            self._awaited.add(live)
        else:
            self._join_queue(live)

    def _join_queue(self, live: LiveJob) -> None:
        self._report_demand_later()
        if self.admission.enqueue(live):
            self.schedule()

    def enqueue_later(self, live: LiveJob, blocked_by: str) -> None:
        """Retry a waiting job until the machine has again what it lacks."""
        if live.blocked_by != blocked_by:
            log.warning("job held up", job=live.job_id, reason=blocked_by)
            live.blocked_by = blocked_by
            live.notify()
        asyncio.get_running_loop().call_later(STORAGE_RETRY_S, self.enqueue, live)

    def _version_resolved(self, jobs: list[LiveJob], result: VersionResult) -> None:
        for live in jobs:
            match result:
                case VersionBlocked():
                    self.enqueue_later(live, str(result))
                case Version():
                    live.version = result
                    live.notify()
                    if live.record.state is State.WAITING:
                        self._join_queue(live)
                case _:
                    self._background.run(self._fail_unusable(live, result.reason, result.output))

    async def _fail_unusable(self, live: LiveJob, reason: str, output: str | None) -> None:
        if output is not None:
            try:
                self._folders.append_to_log(live.job_id, output)
            except OSError as error:
                log.warning("cannot write the log of a job", job=live.job_id, error=str(error))
        await self._live_jobs.fail(live, reason)

    def schedule(self) -> None:
        """Carry out admission's decisions about all waiting jobs."""
        self._report_demand_later()
        if self._background.is_closed:
            return
        for decision in self.admission.schedule():
            live = self._live_jobs.find(decision.job_id)
            assert live is not None
            match decision:
                case Start():
                    self._background.run(self._launch(live))
                case Refuse():
                    self._background.run(self._live_jobs.fail(live, decision.reason))

    async def _launch(self, live: LiveJob) -> None:
        job_id, number = live.job_id, live.record.attempt + 1
        try:
            handle = self._engine.claim(job_id, number)
        except OSError as error:
            self._cancel(live.api_name, job_id)
            self.enqueue_later(live, f"the job's folder cannot be made: {error}")
            return
        record = await self._live_jobs.apply(live, Claim(live.record.attempt, handle))
        if record is None:  # it was stopped, or its deadline has passed
            self._cancel(live.api_name, job_id)
            return
        live.blocked_by = live.engine_wait = None
        live.cancel_timer()  # from here on the supervisor watches the deadline
        if live.stop_wanted:
            self._engine.ledger.release(job_id)
            await self._live_jobs.fail(live, "stopped before it started")
            return
        self._engine.start(attempt_of(live, record.spec))

    def _report_demand_later(self) -> None:
        """Report at most once in a while: each job that comes or goes changes the demand."""
        if self._demand_timer is None:
            loop = asyncio.get_running_loop()
            self._demand_timer = loop.call_later(_DEMAND_INTERVAL_S, self._report_demand)

    def _report_demand(self) -> None:
        self._demand_timer = None
        if self._background.is_closed:
            return
        demand = self.admission.demand(_MAX_DEMAND)
        if demand != self._demand:
            self._demand = demand
            self._engine.demand(demand)

    def _cancel(self, api_name: str, job_id: str) -> None:
        self.admission.cancel(api_name, job_id)
        self.schedule()

    def claim_early(self, draft: JobSpec, *, prestart: bool) -> InitialClaim | None:
        """Reserve capacity for a job that is about to be stored, and make its handle. None where
        the job has to wait.

        Args:
            prestart: whether to use the time of the store's commit: this job is going to be stored,
                most likely, and no other is being stored now.
        """
        api = self._catalogue.find(draft.api_name)
        version = None if api is None else self._versions.ready(api.api_id)
        if version is None:
            return None
        if not self.admission.try_claim(draft.api_name, draft.job_id, version.api.compute):
            return None
        try:
            handle = self._engine.claim(draft.job_id, 1)
        except OSError:  # the job waits until its folder can be made, and says so
            self._cancel(draft.api_name, draft.job_id)
            return None
        if prestart:
            spec = replace(draft, api_id=version.api.api_id)
            self._engine.prepare(Attempt(spec, version, 1, handle, _deadline(spec)))
        return InitialClaim(version.api.api_id, handle)

    def cancel_claim(self, draft: JobSpec, *, is_refused: bool) -> None:
        """The claim was not stored.

        Args:
            is_refused: whether it is certain that the job was not stored either.
        """
        if is_refused:
            self._remove_folder(self._folders.folder(draft.job_id))
        self._cancel(draft.api_name, draft.job_id)

    def start_claimed(self, record: JobRecord) -> None:
        """Start a job that was claimed while it was stored."""
        live = self._live_jobs.add(record, self.admission.why_waiting)
        live.version = self._versions.ready(record.spec.api_id)
        self._set_deadline(live)
        self._engine.start(attempt_of(live, record.spec))

    def _remove_folder(self, folder: Path) -> None:
        """Remove the folder of a job that was not stored: retention does not know of it."""
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:  # a supervisor has prepared it, or is preparing it
            self._background.run(_remove_later(folder))

    def watch_deadline(self, live: LiveJob) -> bool:
        """Time a waiting job out at its deadline; False if the deadline has passed."""
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

    def _set_deadline(self, live: LiveJob) -> None:
        if live.deadline is None:  # once: from here on a change of the wall clock does not matter
            live.deadline = _deadline(live.record.spec)

    def _deadline_passed(self, live: LiveJob) -> None:
        self._background.run(self._time_out(live))

    async def _time_out(self, live: LiveJob) -> None:
        if live.record.state is State.WAITING:
            message = f"timeout of {live.record.spec.timeout} s passed while it waited"
            await self._live_jobs.apply(live, platform_end(Event.TIME_OUT, live.record, message))

    def release(self, live: LiveJob) -> None:
        """A job runs or waits no longer: others may start."""
        if live.version is None:
            self._awaited.discard(live)
        self._report_demand_later()
        if self.admission.release(live):
            self.schedule()


async def _remove_later(folder: Path) -> None:
    await asyncio.sleep(_FOLDER_GRACE_S)
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _deadline(spec: JobSpec) -> float | None:
    deadline_ns = spec.deadline_ns
    return None if deadline_ns is None else time.monotonic() + (deadline_ns - now_ns()) / 1e9


def attempt_of(live: LiveJob, spec: JobSpec) -> Attempt:
    """A claimed job as the engine knows it. `spec` has the config if the job is to be started."""
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
