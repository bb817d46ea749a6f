"""Admission decides which waiting job starts next, and acts on nothing: the dispatcher does.

Jobs wait first in, first out once their version is ready. `WaitingQueue` has the rule, and what
each waiting job holds. The words for why a job waits are made here and there.
"""

from __future__ import annotations

from cortex.engines.capacity import CapacityLedger
from cortex.operator.dispatch.line import Decision, WaitingQueue
from cortex.operator.dispatch.live_jobs import LiveJob, LiveJobs
from cortex.spec.api import Compute
from cortex.spec.lifecycle import State


class Admission:
    """All methods are called on the event loop."""

    def __init__(self, live_jobs: LiveJobs, ledger: CapacityLedger) -> None:
        self._live_jobs = live_jobs
        self._ledger = ledger
        self._queue = WaitingQueue(ledger, self._is_waiting)
        self._pending_unclaimed = 0

    def limit(self, api_name: str, max_running: int | None) -> None:
        """Limit the running jobs of an API; see `WaitingQueue.limit`."""
        self._queue.limit(api_name, max_running)

    def enqueue(self, live: LiveJob) -> bool:
        """Add a job whose version is ready.

        Returns:
            Whether `schedule` may decide otherwise now.
        """
        assert live.version is not None
        compute = live.version.api.compute
        return self._queue.push(live.record.seq, live.job_id, live.api_name, compute)

    def schedule(self) -> list[Decision]:
        """Decide about all waiting jobs; see `WaitingQueue.schedule`."""
        return self._queue.schedule()

    def try_claim(self, api_name: str, job_id: str, compute: Compute) -> bool:
        """Reserve capacity for a job that is about to be stored, and count the job as running.
        False where an earlier job would start before it, or it does not fit."""
        return not self._pending_unclaimed and self._queue.try_claim(job_id, api_name, compute)

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
            Whether `schedule` may decide otherwise now.
        """
        if self._queue.release(live.api_name, live.job_id):
            return True
        if live.version is None:
            return False
        return self._queue.remove(live.job_id, live.api_name, live.version.api.compute)

    def demand(self, limit: int) -> list[Compute]:
        """What the first jobs of the queue need, in their order; see `Engine.demand`."""
        return self._queue.first(limit)

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
        return self._queue.why(live.job_id, live.api_name, live.version.api.compute)

    def _is_waiting(self, job_id: str) -> bool:
        live = self._live_jobs.find(job_id)
        return live is not None and live.record.state is State.WAITING
