"""The placement of jobs on the nodes of a cluster. The Ray engine uses it.

Ray could queue a job that does not fit yet, but would not say why the job waits. The operator
therefore chooses a node, by Ray's figures for all nodes. The node's agent informs Ray of what its
jobs take.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Generic, TypeVar

from cortex.engines.base import NOTHING, Capacity, NodeInfo
from cortex.engines.capacity import (
    NO_HOLDS,
    Hold,
    Holds,
    Selection,
    amounts,
    capacity_of,
    fits,
    label_text,
    lacking,
    selection_of,
    selects,
)
from cortex.engines.ray.messages import Drain, NodeState
from cortex.spec.api import Compute

T = TypeVar("T")

_SILENT = "its agent does not answer"
_DRAINED = "it is being drained"
_PAUSE_S = 30.0
_MAX_PAUSE_S = 600.0
_MAX_SUSPICIONS = 8
_MAX_COMPARED = 16  # nodes among which one is chosen for a waiting job


class Node:
    """One node, and what this operator's jobs take of it."""

    def __init__(self, state: NodeState, number: int, on_change: Callable[[Node], None]) -> None:
        """
        Args:
            state: Ray's figures.
            number: orders the nodes in a `CapacityIndex`.
            on_change: called when the free capacity changes, and when `is_ready` does.
        """
        self.state = state
        self.number = number
        self.problem: str | None = None
        """Why the node takes no new job, where `is_ready` is False."""
        self.death = ""
        """Why the node has left, where its platform ended it on purpose."""
        self._is_ready = False
        self._reported: str | None = None
        self._suspicions = 0
        self._suspected_until = 0.0
        self._suspicion: str | None = None
        self._held = self._previous_held = NOTHING
        self._on_change = on_change
        self._shares: dict[str, Capacity] = {}
        self._own = NOTHING
        # What others take, by Ray's last two updates: a single one may count a reservation that
        # was released a moment before.
        self._others = self._previous_others = self._taken_by_others()
        self.free = self._compute_free()

    @property
    def node_id(self) -> str:
        return self.state.node_id

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def is_ready(self) -> bool:
        """Whether the node takes new jobs."""
        return self._is_ready

    @is_ready.setter
    def is_ready(self, is_ready: bool) -> None:
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._on_change(self)

    @property
    def is_available(self) -> bool:
        """Whether the node takes jobs: its agent answers, and the node is not being drained."""
        return self._is_ready and self.state.drain is None

    @property
    def is_starting(self) -> bool:
        """Whether the agent has not answered yet, and nothing has failed."""
        return not self._is_ready and self.problem is None and self.state.drain is None

    @property
    def why_unavailable(self) -> str | None:
        """Why the node takes no jobs, where that is known."""
        return self.problem if self.state.drain is None else _drain_text(self.state.drain)

    def update(self, state: NodeState) -> None:
        """Apply an update of Ray's figures."""
        was_available, has_new_total = self.is_available, state.total != self.state.total
        self.state = state
        self._previous_others, self._others = self._others, self._taken_by_others()
        self._previous_held = self._held
        self._update_free()
        if has_new_total or self.is_available != was_available:
            self._on_change(self)

    @property
    def usable(self) -> Capacity:
        """What the node has for this operator's jobs."""
        return self.state.total - self._others.minimum(self._previous_others)

    def set_held(self, held: Capacity) -> None:
        """Ray has reserved this much on the node for this operator's jobs."""
        self._held = held

    def suspect(self, reason: str) -> None:
        """Something that the node should have answered was not answered: for a while, longer with
        each time, it takes no new job."""
        pause_s = min(_MAX_PAUSE_S, _PAUSE_S * 2**self._suspicions)
        self._suspected_until = time.monotonic() + pause_s
        self._suspicions = min(self._suspicions + 1, _MAX_SUSPICIONS)
        self.problem = self._suspicion = reason
        self.is_ready = False

    def trust(self) -> None:
        """The node has taken an order: earlier suspicions count no longer."""
        self._suspicions = 0

    def answered(self, problem: str | None) -> None:
        """The node's agent has answered.

        Args:
            problem: why the node takes no new job, by its own report.
        """
        self._reported = problem
        if problem is not None:
            self.problem, self.is_ready = problem, False
        elif time.monotonic() < self._suspected_until:
            self.problem, self.is_ready = self._suspicion, False
        elif not self.is_ready:
            self.problem, self.is_ready = None, True

    def set_silent(self, *, is_silent: bool) -> bool:
        """Whether the node's agent has sent nothing for a while: then the node takes no new job.

        Returns:
            Whether this changes `is_ready`.
        """
        was_ready = self.is_ready
        if is_silent and was_ready:
            self.problem, self.is_ready = _SILENT, False
        elif not is_silent and self.problem == _SILENT:
            self.answered(self._reported)
        return self.is_ready != was_ready

    def add(self, job_id: str, compute: Compute) -> None:
        """Count a job's share as taken."""
        self._shares[job_id] = capacity_of(compute)
        self._own = self._own + self._shares[job_id]
        self._update_free()

    def remove(self, job_id: str) -> None:
        """Count a job's share as free."""
        self._own = self._own - self._shares.pop(job_id)
        self._update_free()

    def _update_free(self) -> None:
        free = self._compute_free()
        if free != self.free:
            self.free = free
            self._on_change(self)

    def _compute_free(self) -> Capacity:
        return self.usable - self._own

    def _taken_by_others(self) -> Capacity:
        # Ray's figures lag behind the agent's: what was released a moment ago may still be taken.
        held = self._held.maximum(self._previous_held)
        return (self.state.taken - held).maximum(NOTHING)


class CapacityIndex(Generic[T]):
    """Nodes sorted by free capacity: a search among a thousand nodes examines few of them.

    Each node has a unique number. Of two nodes with as many free cores, the lower number comes
    first.
    """

    def __init__(self) -> None:
        self._free: dict[int, tuple[Capacity, T]] = {}
        # Sorted by cores, which jobs use up first.
        self._emptiest_first: list[tuple[int, int]] = []
        self._mem: list[int] = []
        self._gpu: list[int] = []

    def add(self, number: int, free: Capacity, node: T) -> None:
        """Add a node that the index does not contain."""
        self._free[number] = free, node
        insort(self._emptiest_first, (-free.cpu_m, number))
        insort(self._mem, free.mem)
        insort(self._gpu, free.gpu)

    def discard(self, number: int) -> None:
        """Remove a node, if the index contains it."""
        if number in self._free:
            free, _ = self._free.pop(number)
            for values, value in ((self._mem, free.mem), (self._gpu, free.gpu)):
                del values[bisect_left(values, value)]
            position = bisect_left(self._emptiest_first, (-free.cpu_m, number))
            del self._emptiest_first[position]

    def emptiest_for(self, compute: Compute, holds: Holds = NO_HOLDS) -> T | None:
        """The node with the most free cores on which `compute` fits, or None.

        Args:
            holds: what must stay free, by the numbers of the nodes.
        """
        if not self._free or not fits(compute, self.max_free):
            return None
        for cpu_m, number in self._emptiest_first:
            if -cpu_m < compute.cpu_m:
                return None
            free, node = self._free[number]
            if fits(compute, holds.left_of(number, free)):
                return node
        return None

    def emptiest_first(self) -> Iterator[T]:
        """All nodes, those with the most free cores first."""
        return (self._free[number][1] for _, number in self._emptiest_first)

    @property
    def is_empty(self) -> bool:
        return not self._free

    @property
    def max_free(self) -> Capacity:
        """The largest free amount of each resource, not necessarily on the same node."""
        if not self._free:
            return NOTHING
        return Capacity(-self._emptiest_first[0][0], self._mem[-1], self._gpu[-1])


class _LabelIndex:
    """The ready nodes with certain labels. Jobs without GPUs prefer nodes without GPUs."""

    def __init__(self, labels: Mapping[str, tuple[str, ...]]) -> None:
        self._labels = labels
        self._without_gpus: CapacityIndex[Node] = CapacityIndex()
        self._with_gpus: CapacityIndex[Node] = CapacityIndex()
        self._nodes: dict[int, Node] = {}
        self._totals: dict[int, Capacity] = {}
        self._can_run: dict[Capacity, bool] = {}  # by what a job takes

    def update(self, node: Node, *, is_available: bool) -> None:
        """Index a node by its present free capacity, or remove one that is not available."""
        self._without_gpus.discard(node.number)
        self._with_gpus.discard(node.number)
        total = node.state.total
        if is_available and selects(self._labels, node.state.labels):
            index = self._with_gpus if total.gpu else self._without_gpus
            index.add(node.number, node.free, node)
            if self._totals.get(node.number) != total:
                self._nodes[node.number], self._totals[node.number] = node, total
                self._can_run.clear()
        elif self._nodes.pop(node.number, None) is not None:
            del self._totals[node.number]
            self._can_run.clear()

    def find(self, number: int) -> Node | None:
        """A node of this index by its number."""
        return self._nodes.get(number)

    def can_run(self, compute: Compute) -> bool:
        """Whether a node could run a job, if it ran nothing else."""
        wanted = capacity_of(compute)
        found = self._can_run.get(wanted)
        if found is None:
            found = any(fits(compute, total) for total in self._totals.values())
            self._can_run[wanted] = found
        return found

    def node_for(self, compute: Compute, holds: Holds = NO_HOLDS) -> Node | None:
        """The best node for a job, or None."""
        return self._without_gpus.emptiest_for(compute, holds) or self._with_gpus.emptiest_for(
            compute, holds
        )

    def node_to_wait_for(self, compute: Compute, holds: Holds) -> Node:
        """The node that lacks least for a job, among the emptiest that could run it: one that other
        programs leave to this operator, and one without GPUs for a job without."""
        nodes = chain(self._without_gpus.emptiest_first(), self._with_gpus.emptiest_first())
        able = (node for node in nodes if fits(compute, node.state.total))

        def order(node: Node) -> tuple[bool, bool, float]:
            wastes_gpus = not compute.gpu and node.state.total.gpu > 0
            left = holds.left_of(node.number, node.free)
            return not fits(compute, node.usable), wastes_gpus, _shortage(compute, left)

        return min(islice(able, _MAX_COMPARED), key=order)

    @property
    def is_empty(self) -> bool:
        return self._without_gpus.is_empty and self._with_gpus.is_empty

    @property
    def max_free(self) -> Capacity:
        """See `CapacityIndex.max_free`; the index must not be empty."""
        indexes = (self._without_gpus, self._with_gpus)
        free = [index.max_free for index in indexes if not index.is_empty]
        return free[0].maximum(free[-1])


class Placement:
    """The alive nodes, the jobs placed on them, and every size of node that there ever was. A
    `CapacityLedger`."""

    def __init__(
        self, report_freed: Callable[[], object] = lambda: None, *, has_autoscaler: bool = False
    ) -> None:
        """
        Args:
            has_autoscaler: whether the cluster may add nodes of kinds that it never had. Ray does
                not say which kinds, and no job is refused then.
            report_freed: called when `release` has freed capacity and a reservation was refused
                before.
        """
        self._report_freed = report_freed
        self._has_autoscaler = has_autoscaler
        self.alive: dict[str, Node] = {}
        self.waits_for: str | None = None
        """What all jobs wait for, while the nodes cannot be read."""
        self.is_settling = False
        """Whether nodes may be starting that this operator has never seen: no job is refused."""
        self._numbers = count()
        self._node_of_job: dict[str, Node] = {}  # by job
        self._indexes: dict[Selection, _LabelIndex] = {}
        # The total capacity and the labels of all nodes, lost ones included.
        self._kinds: set[tuple[Capacity, tuple[tuple[str, str], ...]]] = set()
        self._refusals: dict[tuple[Capacity, Selection], str | None] = {}
        self._has_refused = False

    @property
    def total(self) -> Capacity:
        return sum((node.state.total for node in self.alive.values()), NOTHING)

    def update(self, states: tuple[NodeState, ...]) -> list[Node]:
        """Apply Ray's figures.

        Returns:
            The nodes that have left the cluster.
        """
        states_by_id = {state.node_id: state for state in states if state.is_alive}
        deaths = {state.node_id: state.death for state in states if not state.is_alive}
        lost = [node for node_id, node in self.alive.items() if node_id not in states_by_id]
        for node in lost:
            del self.alive[node.node_id]
            node.death = deaths.get(node.node_id, "")
            self._update_indexes(node)
        for node_id, state in states_by_id.items():
            self._add_kind(state)
            if node_id in self.alive:
                self.alive[node_id].update(state)
            else:
                self.alive[node_id] = Node(state, next(self._numbers), self._update_indexes)
        return lost

    def refusal(self, compute: Compute) -> str | None:
        """Why no node could ever run this job, or None. Lost nodes count, as they may come back."""
        if self.is_settling or self._has_autoscaler:
            return None
        return self._why_never(compute)

    def unmet(self, waiting: Sequence[Compute]) -> list[Compute]:
        """Those of the waiting jobs that fit on no node, in their order: all others take what is
        free, also on nodes whose agents have not answered yet."""
        nodes = [node for node in self.alive.values() if node.is_available or node.is_starting]
        free = [node.free for node in nodes]
        # No node before this one has room for a job of this kind: free capacity only shrinks here.
        first: dict[tuple[Capacity, Selection], int] = {}
        unmet = []
        for compute in waiting:
            kind = capacity_of(compute), selection_of(compute)
            for index in range(first.get(kind, 0), len(free)):
                if fits(compute, free[index]) and selects(
                    compute.node_labels, nodes[index].state.labels
                ):
                    free[index] = free[index] - kind[0]
                    first[kind] = index
                    break
            else:
                first[kind] = len(free)
                unmet.append(compute)
        return unmet

    def _why_never(self, compute: Compute) -> str | None:
        key = capacity_of(compute), selection_of(compute)
        if key not in self._refusals:
            self._refusals[key] = self._permanent_refusal(compute)
        return self._refusals[key]

    def can_run(self, compute: Compute) -> bool:
        """See `CapacityLedger.can_run`."""
        can_run = self._index_for(compute).can_run(compute)
        self._has_refused = self._has_refused or not can_run
        return can_run

    def reserve(self, job_id: str, compute: Compute, holds: Holds = NO_HOLDS) -> str | Hold | None:
        """See `CapacityLedger.reserve`. The job runs on its `node_of`."""
        if job_id in self._node_of_job:
            return None
        index = self._index_for(compute)
        node = index.node_for(compute, holds)
        if node is not None:
            self.reserve_granted(job_id, compute, node.node_id)
            return None
        self._has_refused = True
        return self.lacks(compute) or next(
            hold
            for hold in holds
            if (held := index.find(hold.node)) is not None and fits(compute, held.free)
        )

    def hold(self, job_id: str, compute: Compute, holds: Holds, kept: Hold | None) -> Hold:
        """See `CapacityLedger.hold`."""
        index = self._index_for(compute)
        node = None if kept is None else index.find(kept.node)
        if node is None or not fits(compute, node.usable):
            node = index.node_to_wait_for(compute, holds)
        return Hold(job_id, node.number, capacity_of(compute))

    def lacks(self, compute: Compute) -> str | None:
        """See `CapacityLedger.lacks`."""
        index = self._index_for(compute)
        if index.node_for(compute) is not None:
            return None
        is_growing = self._has_autoscaler and self.waits_for is None
        if is_growing and (reason := self._why_never(compute)) is not None:
            return f"waits for a node that the cluster's autoscaler adds: {reason}"
        if index.is_empty:
            return self._why_no_node(compute)
        labels = _label_suffix(compute)
        return (
            lacking(compute, index.max_free, f"{{}} free on one node{labels}")
            or f"no node{labels} has {amounts(compute)} free"
        )

    def reserve_granted(self, job_id: str, compute: Compute, node_id: str) -> None:
        """Place a job on the node that already runs it, even beyond the node's capacity."""
        node = self.alive.get(node_id)
        if node is not None and job_id not in self._node_of_job:
            node.add(job_id, compute)
            self._node_of_job[job_id] = node

    def node_of(self, job_id: str) -> Node | None:
        """The node on which a job has a reservation."""
        return self._node_of_job.get(job_id)

    def release(self, job_id: str) -> None:
        """See `CapacityLedger.release`. This engine prepares nothing that must be undone."""
        if self.remove_reservation(job_id) and self.pop_refused():
            self._report_freed()

    def remove_reservation(self, job_id: str) -> bool:
        """Remove the reservation of a job; whether it had one."""
        node = self._node_of_job.pop(job_id, None)
        if node is None:
            return False
        node.remove(job_id)
        return True

    def pop_refused(self) -> bool:
        """Whether `reserve` has refused a job since the last call, which may fit now."""
        has_refused, self._has_refused = self._has_refused, False
        return has_refused

    def nodes(self) -> list[NodeInfo]:
        """See `CapacityLedger.nodes`."""
        return [
            NodeInfo(
                node.name,
                node.is_available,
                node.state.total,
                node.free,
                node.why_unavailable,
                node.state.labels,
            )
            for node in self.alive.values()
        ]

    def _update_indexes(self, node: Node) -> None:
        is_available = node.is_available and self.alive.get(node.node_id) is node
        for index in self._indexes.values():
            index.update(node, is_available=is_available)

    def _index_for(self, compute: Compute) -> _LabelIndex:
        labels = selection_of(compute)
        index = self._indexes.get(labels)
        if index is None:
            index = self._indexes[labels] = _LabelIndex(compute.node_labels)
            for node in self.alive.values():
                index.update(node, is_available=node.is_available)
        return index

    def _add_kind(self, state: NodeState) -> None:
        kind = state.total, tuple(sorted(state.labels.items()))
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._refusals.clear()

    def _permanent_refusal(self, compute: Compute) -> str | None:
        if not self._kinds:
            return None
        totals = [
            total for total, labels in self._kinds if selects(compute.node_labels, dict(labels))
        ]
        if any(fits(compute, total) for total in totals):
            return None
        labels = _label_suffix(compute)
        if not totals:
            return f"needs a node{labels}, and there is none"
        largest = totals[0]
        for total in totals:
            largest = largest.maximum(total)
        return (
            lacking(compute, largest, f"the largest node{labels} has {{}}")
            or f"no node{labels} has {amounts(compute)}"
        )

    def _why_no_node(self, compute: Compute) -> str:
        if self.waits_for is not None:
            return f"waits for {self.waits_for}"
        labels = _label_suffix(compute)
        if not self.alive:
            return "waits for a node: the cluster has none now"
        nodes = [
            node for node in self.alive.values() if selects(compute.node_labels, node.state.labels)
        ]
        if not nodes:
            return f"waits for a node{labels}: the cluster has none now"
        problems = sorted(f"{node.name}: {node.problem}" for node in nodes if node.problem)
        drained = [f"{node.name}: {_DRAINED}" for node in nodes if node.state.drain is not None]
        problem = f" ({[*problems, *drained][0]})" if problems or drained else ""
        return f"waits for a node{labels} that takes jobs{problem}"


def _shortage(compute: Compute, left: Capacity) -> float:
    """What is lacking for a job, as the sum of the lacking parts of each amount."""
    wanted = capacity_of(compute)
    pairs = ((wanted.cpu_m, left.cpu_m), (wanted.mem, left.mem), (wanted.gpu, left.gpu))
    return sum(max(0, want - have) / want for want, have in pairs if want)


def _drain_text(drain: Drain) -> str:
    if drain.left_s is None:
        return _DRAINED
    return f"{_DRAINED}, and ends in {drain.left_s:.0f} s"


def _label_suffix(compute: Compute) -> str:
    return f" with {label_text(compute.node_labels)}" if compute.node_labels else ""
