"""Admission decides which waiting job starts next, and acts on nothing: the dispatcher does.

Jobs wait first in, first out once their version is ready. The first job that does not fit on the
machine blocks the jobs behind it, so that none is starved; only jobs of an API at its
`limits.max_running` are passed over. The words for why a job waits are made here.
"""

from __future__ import annotations

from dataclasses import dataclass

from cortex.engines.capacity import CapacityLedger
from cortex.operator.dispatch.line import WaitingQueue
from cortex.operator.dispatch.live_jobs import LiveJob, LiveJobs
from cortex.spec.api import Compute
from cortex.spec.lifecycle import State


@dataclass(frozen=True, slots=True)
class Start:
    """This job starts now: its capacity is reserved, and it counts as running."""

    live: LiveJob


@dataclass(frozen=True, slots=True)
class Refuse:
    """This job can never start, because no machine has what it asks for."""

    live: LiveJob
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """No job can start now.

    Attributes:
        reason: what the first job waits for; None where no job waits.
    """

    reason: str | None


Decision = Start | Refuse | Wait


class Admission:
    """All methods are called on the event loop."""

    def __init__(self, live_jobs: LiveJobs, ledger: CapacityLedger) -> None:
        self._live_jobs = live_jobs
        self._ledger = ledger
        self._queue = WaitingQueue()
        self._blocked_by: str | None = None
        self._pending_unclaimed = 0

    def limit(self, api_name: str, max_running: int | None) -> None:
        """Limit the running jobs of an API; see `WaitingQueue.limit`."""
        self._queue.limit(api_name, max_running)

    def enqueue(self, live: LiveJob) -> bool:
        """Add a job whose version is ready.

        Returns:
            Whether `decide` may decide otherwise now: behind a blocked job nothing has changed.
        """
        self._queue.push(live.record.seq, live.job_id, live.api_name)
        return self._blocked_by is None or self._queue.first() == live.job_id

    def decide(self) -> Decision:
        """One step of scheduling. The caller acts on the decision and repeats until `Wait`."""
        while (job_id := self._queue.first()) is not None:
            live = self._live_jobs.find(job_id)
            # 1. A job that has ended or started meanwhile leaves the queue.
            if live is None or live.record.state is not State.WAITING or live.version is None:
                self._queue.pop()
                continue
            # 2. A job of an API at its limit is passed over.
            if self._queue.running_at_limit(live.api_name) is not None:
                self._queue.park()
                continue
            # 3. A job that no machine can ever run is refused.
            compute = live.version.api.compute
            if (refusal := self._ledger.refusal(compute)) is not None:
                self._queue.pop()
                return Refuse(live, refusal)
            # 4. The first job that does not fit right now blocks all behind it.
            self._blocked_by = self._ledger.reserve(job_id, compute)
            if self._blocked_by is not None:
                return Wait(self._blocked_by)
            # 5. The job starts. It counts as running before it is popped, which may unpark another.
            self._queue.admit(live.api_name, job_id)
            self._queue.pop()
            return Start(live)
        self._blocked_by = None
        return Wait(None)

    def try_claim(self, api_name: str, job_id: str, compute: Compute) -> bool:
        """Reserve capacity for a job that is about to be stored, and count the job as running.
        False where other jobs wait before it, or it does not fit."""
        if self._pending_unclaimed or self._queue.first() is not None:
            return False
        if self._queue.running_at_limit(api_name) is not None:
            return False
        if self._ledger.refusal(compute) is not None:
            return False
        if self._ledger.reserve(job_id, compute) is not None:
            return False
        self._queue.admit(api_name, job_id)
        return True

    def submit_begins(self) -> None:
        """A job without a claim is being stored: no job submitted later may claim before it."""
        self._pending_unclaimed += 1

    def submit_ends(self) -> None:
        self._pending_unclaimed -= 1

    def count_recovered(self, api_name: str, job_id: str) -> None:
        """Count a job of an earlier operator as running. `Engine.recover` reserves what it uses."""
        self._queue.admit(api_name, job_id)

    def cancel(self, api_name: str, job_id: str) -> None:
        """Give back what `Start` or `try_claim` reserved, where no `Engine.start` follows."""
        self._ledger.release(job_id)
        self._queue.release(api_name, job_id)

    def release(self, live: LiveJob) -> bool:
        """A job runs no longer, or waits no longer.

        Returns:
            Whether `decide` may decide otherwise now.
        """
        was_running = self._queue.release(live.api_name, live.job_id)
        return was_running or self._queue.first() == live.job_id

    def why_waiting(self, live: LiveJob) -> str | None:
        """What a waiting job waits for, in words; None where it does not wait."""
        if live.record.state is State.STARTING:
            return live.engine_wait
        if live.record.state is not State.WAITING:
            return None
        if live.blocked_by is not None:
            return f"retrying until this clears: {live.blocked_by}"
        if live.version is None:
            return "its environment is being built"
        if failed := live.failed_starts:
            return f"{failed} start {'attempt' if failed == 1 else 'attempts'} failed; retrying"
        return self._why_queued(live)

    def _why_queued(self, live: LiveJob) -> str | None:
        running = self._queue.running_at_limit(live.api_name)
        if running is not None:
            jobs = "1 job of this API is" if running == 1 else f"{running} jobs of this API are"
            return f"{jobs} running, its limits.max_running"
        if self._blocked_by is not None and self._queue.first() != live.job_id:
            return f"waits behind earlier jobs, the first of which {self._blocked_by}"
        return self._blocked_by
