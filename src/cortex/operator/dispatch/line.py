"""The line in which jobs wait for a start: first in, first out, but that jobs of an API which runs as
many as its `limits.max_running` allows step aside and hold nobody up. Used by the dispatcher alone.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

QueueEntry = tuple[int, str, str]  # the job's seq, which orders, its id, and its API


class WaitingQueue:
    """Who waits, and who has got a place to run."""

    def __init__(self) -> None:
        self._waiting: list[QueueEntry] = []
        self._aside: dict[str, list[QueueEntry]] = {}
        self._running: defaultdict[str, set[str]] = defaultdict(set)
        self._most: dict[str, int] = {}

    def limit(self, api_name: str, most: int | None) -> None:
        """Let at most so many jobs of an API run at once, whichever version they are of."""
        if most is None:
            self._most.pop(api_name, None)
        else:
            self._most[api_name] = most
        for place in self._aside.pop(api_name, ()):
            heapq.heappush(self._waiting, place)

    def join(self, seq: int, job_id: str, api_name: str) -> None:
        """Wait, in the order of `seq`."""
        heapq.heappush(self._waiting, (seq, job_id, api_name))

    def first(self) -> str | None:
        """The job whose turn it is."""
        return self._waiting[0][1] if self._waiting else None

    def leave(self) -> None:
        """The first one waits no more."""
        _, _, api_name = heapq.heappop(self._waiting)
        self._call_back(api_name)

    def step_aside(self) -> None:
        """The first one waits until another job of its API is over."""
        place = heapq.heappop(self._waiting)
        heapq.heappush(self._aside.setdefault(place[2], []), place)

    def full(self, api_name: str) -> int | None:
        """How many jobs of an API run, if that is as many as may; else None."""
        most = self._most.get(api_name)
        running = len(self._running.get(api_name, ()))
        return running if most is not None and running >= most else None

    def occupy(self, api_name: str, job_id: str) -> None:
        """Give a job a place."""
        self._running[api_name].add(job_id)

    def vacate(self, api_name: str, job_id: str) -> bool:
        """Take a job's place back; False if it had none."""
        places = self._running.get(api_name)
        if places is None or job_id not in places:
            return False
        places.discard(job_id)
        if not places:
            del self._running[api_name]
        self._call_back(api_name)
        return True

    def _call_back(self, api_name: str) -> None:
        """One more of those that stepped aside may try again: one at a time, for there may be many,
        and each that leaves without taking the place calls the next."""
        aside = self._aside.get(api_name)
        if not aside or self.full(api_name) is not None:
            return
        heapq.heappush(self._waiting, heapq.heappop(aside))
        if not aside:
            del self._aside[api_name]
