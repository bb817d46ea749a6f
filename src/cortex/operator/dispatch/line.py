"""The waiting queue decides which waiting job starts next. Used by `admission` alone.

The jobs are considered in their order. A job that fits starts. One that does not fit becomes the
head of its selection of nodes (its `compute.node_labels`), unless an earlier job is the head, and
holds what it needs on one node: later jobs, of any selection, get what the heads before them leave.
A head therefore fits at the latest when the jobs have ended that ran on its node before. All other
jobs wait without a hold; the next of them becomes the head when the head starts.

Two kinds of jobs hold nothing: those of an API at its `limits.max_running`, and those that no ready
node could run.

Jobs of one API that need the same form a lane. Where the first job of a lane does not fit, the
others do not fit either: a decision costs time for each lane, and none for each job.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from cortex.engines.base import Capacity
from cortex.engines.capacity import (
    CapacityLedger,
    Hold,
    Holds,
    Selection,
    capacity_of,
    selection_of,
)
from cortex.spec.api import Compute


@dataclass(frozen=True, slots=True)
class Start:
    """This job starts now: its capacity is reserved, and it counts as running."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """This job can never start, because no machine has what it asks for."""

    job_id: str
    reason: str


Decision = Start | Refuse


class _Lane:
    """The waiting jobs of an API that need the same, in their order."""

    def __init__(self, api_name: str, compute: Compute) -> None:
        self.api_name = api_name
        self.compute = compute
        self.selection = selection_of(compute)
        self.amount = capacity_of(compute)
        self.jobs: list[tuple[int, str]] = []  # a heap of sequence numbers and job ids
        self.obstacle: Compute | None = None
        """What the first job waits for: the capacity that it lacks itself, or that an earlier job
        lacks, which it waits behind."""
        self.is_known_to_run = False
        """Whether a machine was ready that can run the jobs: then they are never refused."""

    @property
    def first(self) -> str:
        """The id of the first job."""
        return self.jobs[0][1]


_LaneKey = tuple[str, Selection, Capacity]


@dataclass(frozen=True, slots=True)
class _Head:
    """The first job of a selection of nodes that does not fit.

    Attributes:
        obstacle: see `_Lane`.
        kept: its hold until now.
    """

    job_id: str
    lane: _Lane
    obstacle: Compute
    kept: Hold | None


class WaitingQueue:
    """The jobs that wait, and for each API the jobs that run.

    The caller calls `schedule` whenever a method returns True, when a limit has changed, and when
    the engine reports CapacityFreed.
    """

    def __init__(self, ledger: CapacityLedger, is_waiting: Callable[[str], bool]) -> None:
        """
        Args:
            is_waiting: whether a job that was pushed still waits. Others are dropped.
        """
        self._ledger = ledger
        self._is_waiting = is_waiting
        self._lanes: dict[_LaneKey, _Lane] = {}
        self._running: defaultdict[str, set[str]] = defaultdict(set)
        self._max_running: dict[str, int] = {}
        # What `schedule` has found. `_unfit` has what the jobs need that did not fit, and their
        # obstacles: a later job of the same selection that needs as much does not fit either.
        self._unfit: dict[Selection, dict[Capacity, Compute]] = {}
        self._heads: dict[Selection, _Head] = {}
        self._heads_of_api: defaultdict[str, list[_Head]] = defaultdict(list)
        self._holds = Holds()
        # Heads whose holds are placed when a later job might take what they need.
        self._without_hold: list[_Head] = []

    def limit(self, api_name: str, max_running: int | None) -> None:
        """Limit the running jobs of an API, of all its versions together; None lifts the limit."""
        if max_running is None:
            self._max_running.pop(api_name, None)
        else:
            self._max_running[api_name] = max_running

    def push(self, seq: int, job_id: str, api_name: str, compute: Compute) -> bool:
        """Add a job, in the order of `seq`.

        Returns:
            Whether `schedule` may start it now: in its lane no job is before it.
        """
        key = _key(api_name, compute)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(api_name, compute)
        heapq.heappush(lane.jobs, (seq, job_id))
        return lane.first == job_id

    def first(self, limit: int) -> list[Compute]:
        """What the jobs need that could start if there was capacity: about the first, in order.

        Args:
            limit: how many jobs are examined.
        """
        # The beginning of a heap has the first jobs, and a few later ones.
        jobs = ((*job, lane) for lane in self._lanes.values() for job in lane.jobs[:limit])
        left: dict[str, int] = {}  # by API, how many more may run
        found = []
        for _, job_id, lane in heapq.nsmallest(limit, jobs):
            limit_of_api = self._max_running.get(lane.api_name)
            if not self._is_waiting(job_id):
                continue
            if limit_of_api is not None:
                running = len(self._running.get(lane.api_name, ()))
                left[lane.api_name] = left.get(lane.api_name, limit_of_api - running) - 1
                if left[lane.api_name] < 0:
                    continue
            found.append(lane.compute)
        return found

    def remove(self, job_id: str, api_name: str, compute: Compute) -> bool:
        """A job waits no longer.

        Returns:
            Whether `schedule` may decide otherwise now: the job was the first of its lane.
        """
        lane = self._lanes.get(_key(api_name, compute))
        if lane is None or lane.first != job_id:
            return False
        self._pop(lane)
        return True

    def schedule(self) -> list[Decision]:
        """Decide about all waiting jobs. The caller carries the decisions out."""
        kept = {hold.job_id: hold for hold in self._holds}
        kept |= {head.job_id: head.kept for head in self._without_hold if head.kept is not None}
        self._unfit, self._heads, self._heads_of_api = {}, {}, defaultdict(list)
        self._holds, self._without_hold = Holds(), []
        for lane in list(self._lanes.values()):
            self._drop_ended(lane)
        lanes = [(*lane.jobs[0], lane) for lane in self._lanes.values()]
        heapq.heapify(lanes)
        decisions = []
        while lanes:
            _, job_id, lane = heapq.heappop(lanes)
            decision = self._decide(job_id, lane, kept.get(job_id))
            if decision is not None:
                decisions.append(decision)
                self._pop(lane)
                if lane.jobs:
                    heapq.heappush(lanes, (*lane.jobs[0], lane))
        return decisions

    def _decide(self, job_id: str, lane: _Lane, kept: Hold | None) -> Decision | None:
        """Decide about the first job of a lane. None: the lane waits."""
        compute = lane.compute
        # 1. A job of an API at its limit is passed over.
        if self._is_at_limit(lane.api_name):
            heads = self._heads_of_api[lane.api_name]
            lane.obstacle = heads[0].obstacle if heads else None
            return None
        # 2. A job that needs as much as an earlier one that did not fit does not fit either.
        unfit = self._unfit.setdefault(lane.selection, {})
        obstacle = _obstacle_among(unfit, lane.amount) if lane.is_known_to_run else None
        # 3. A job that no machine can ever run is refused.
        if obstacle is None and (refusal := self._ledger.refusal(compute)) is not None:
            return Refuse(job_id, refusal)
        # 4. One that no machine can run now holds nothing, and no job waits behind it.
        if obstacle is None:
            lane.is_known_to_run = self._ledger.can_run(compute)
            obstacle = _obstacle_among(unfit, lane.amount) if lane.is_known_to_run else compute
        # 5. A job that fits beside the holds of earlier jobs starts.
        if obstacle is None:
            found = self._ledger.reserve(job_id, compute, self._placed_holds())
            if found is None:
                self.admit(lane.api_name, job_id)
                return Start(job_id)
            obstacle = self._obstacle_of_head(found.job_id) if isinstance(found, Hold) else compute
            unfit[lane.amount] = obstacle
            # 6. The first job of a selection that does not fit holds what it needs.
            if lane.selection not in self._heads:
                self._add_head(_Head(job_id, lane, obstacle, kept))
        lane.obstacle = obstacle
        return None

    def _add_head(self, head: _Head) -> None:
        self._heads[head.lane.selection] = head
        self._heads_of_api[head.lane.api_name].append(head)
        self._without_hold.append(head)

    def try_claim(self, job_id: str, api_name: str, compute: Compute) -> bool:
        """Start a job that is not in the queue, where `schedule` would start it behind all others:
        reserve its capacity, and count it as running."""
        if self._is_at_limit(api_name) or self._ledger.refusal(compute) is not None:
            return False
        unfit = self._unfit.get(selection_of(compute), {})
        if _obstacle_among(unfit, capacity_of(compute)) is not None:
            return False
        if self._ledger.reserve(job_id, compute, self._placed_holds()) is not None:
            return False
        self.admit(api_name, job_id)
        return True

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
        return True

    def running_at_limit(self, api_name: str) -> int | None:
        """The number of running jobs of an API where it has reached the limit; else None."""
        limit = self._max_running.get(api_name)
        running = len(self._running.get(api_name, ()))
        return running if limit is not None and running >= limit else None

    def why(self, job_id: str, api_name: str, compute: Compute) -> str | None:
        """What a job in the queue waits for, in words; None where it is about to start."""
        running = self.running_at_limit(api_name)
        if running is not None:
            jobs = "1 job of this API is" if running == 1 else f"{running} jobs of this API are"
            return f"{jobs} running, its limits.max_running"
        lane = self._lanes.get(_key(api_name, compute))
        if lane is None or lane.obstacle is None:
            return None
        is_first = lane.first == job_id
        if (is_first and lane.obstacle is lane.compute) or not self._ledger.can_run(compute):
            return self._ledger.lacks(compute)
        lacks = self._ledger.lacks(lane.obstacle)
        return None if lacks is None else f"waits behind earlier jobs, the first of which {lacks}"

    def _is_at_limit(self, api_name: str) -> bool:
        """Whether no further job of an API may start. A head keeps its place among the running jobs
        of its API: otherwise later jobs of the API that need less could always start before it."""
        limit = self._max_running.get(api_name)
        if limit is None:
            return False
        heads = len(self._heads_of_api.get(api_name, ()))
        return len(self._running.get(api_name, ())) + heads >= limit

    def _placed_holds(self) -> Holds:
        for head in self._without_hold:
            compute = head.lane.compute
            if self._ledger.can_run(compute):  # its node may have left the cluster meanwhile
                self._holds.add(self._ledger.hold(head.job_id, compute, self._holds, head.kept))
        self._without_hold.clear()
        return self._holds

    def _obstacle_of_head(self, job_id: str) -> Compute:
        return next(head.obstacle for head in self._heads.values() if head.job_id == job_id)

    def _pop(self, lane: _Lane) -> None:
        """Remove the first job of a lane."""
        heapq.heappop(lane.jobs)
        self._drop_ended(lane)

    def _drop_ended(self, lane: _Lane) -> None:
        """Let a lane begin with a job that waits, or remove it."""
        while lane.jobs and not self._is_waiting(lane.first):
            heapq.heappop(lane.jobs)
        if not lane.jobs:
            del self._lanes[lane.api_name, lane.selection, lane.amount]


def _key(api_name: str, compute: Compute) -> _LaneKey:
    return api_name, selection_of(compute), capacity_of(compute)


def _obstacle_among(unfit: dict[Capacity, Compute], amount: Capacity) -> Compute | None:
    """The obstacle of a job that did not fit and needs no more than `amount`."""
    cpu_m, mem, gpu = amount.cpu_m, amount.mem, amount.gpu
    for smaller, obstacle in unfit.items():
        if smaller.cpu_m <= cpu_m and smaller.mem <= mem and smaller.gpu <= gpu:
            return obstacle
    return None
