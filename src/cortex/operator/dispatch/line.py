"""The waiting line: first in, first out. Jobs of an API that has as many running jobs as its
`limits.max_running` allows are parked and block no other job. Used by `admission` alone.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

QueueEntry = tuple[int, str, str]
"""The job's sequence number (the order), its id, and the name of its API."""


class WaitingQueue:
    """The jobs that wait, and for each API the jobs that run."""

    def __init__(self) -> None:
        self._waiting: list[QueueEntry] = []
        self._parked: dict[str, list[QueueEntry]] = {}
        self._running: defaultdict[str, set[str]] = defaultdict(set)
        self._max_running: dict[str, int] = {}

    def limit(self, api_name: str, max_running: int | None) -> None:
        """Limit the running jobs of an API, of all its versions together; None lifts the limit."""
        if max_running is None:
            self._max_running.pop(api_name, None)
        else:
            self._max_running[api_name] = max_running
        for entry in self._parked.pop(api_name, ()):
            heapq.heappush(self._waiting, entry)

    def push(self, seq: int, job_id: str, api_name: str) -> None:
        """Add a job, in the order of `seq`."""
        heapq.heappush(self._waiting, (seq, job_id, api_name))

    def first(self) -> str | None:
        """The id of the first job; None where none waits."""
        return self._waiting[0][1] if self._waiting else None

    def pop(self) -> None:
        """Remove the first job."""
        _, _, api_name = heapq.heappop(self._waiting)
        self._unpark_one(api_name)

    def park(self) -> None:
        """Set the first job aside until a running job of its API has ended."""
        entry = heapq.heappop(self._waiting)
        heapq.heappush(self._parked.setdefault(entry[2], []), entry)

    def running_at_limit(self, api_name: str) -> int | None:
        """The number of running jobs of an API where it has reached the limit; else None."""
        limit = self._max_running.get(api_name)
        running = len(self._running.get(api_name, ()))
        return running if limit is not None and running >= limit else None

    def admit(self, api_name: str, job_id: str) -> None:
        """Count a job as running."""
        self._running[api_name].add(job_id)

    def release(self, api_name: str, job_id: str) -> bool:
        """Count a job as running no longer; False where it was not counted."""
        running = self._running.get(api_name)
        if running is None or job_id not in running:
            return False
        running.discard(job_id)
        if not running:
            del self._running[api_name]
        self._unpark_one(api_name)
        return True

    def _unpark_one(self, api_name: str) -> None:
        """Let one parked job try again. One at a time, for there may be many: each job that is
        popped and not admitted unparks the next."""
        parked = self._parked.get(api_name)
        if not parked or self.running_at_limit(api_name) is not None:
            return
        heapq.heappush(self._waiting, heapq.heappop(parked))
        if not parked:
            del self._parked[api_name]
