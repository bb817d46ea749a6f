"""The nodes of a cluster: which node a job runs on, and what jobs have reserved of each. Called by the Ray
engine; the operator calls `Placement` as a `CapacityLedger`.

Ray could queue a job that does not fit yet, but would not say what the job waits for. Therefore the
engine chooses a node by what Ray reports of all nodes, and then asks Ray for exactly that node. Ray may
still refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

from cortex.engines.base import NOTHING, Capacity, NodeInfo
from cortex.engines.capacity import amounts, fits, label_words, lacking, selects
from cortex.engines.ray.capacity_index import CapacityIndex
from cortex.engines.ray.messages import NodeState
from cortex.spec.api import Compute

Labels = tuple[tuple[str, tuple[str, ...]], ...]  # labels that are asked for, in order


class Node:
    """A node, and what jobs of this operator have reserved of it."""

    def __init__(self, state: NodeState, number: int, moved: Callable[[Node], None]) -> None:
        """
        Args:
            moved: called when the free capacity changes, and when the agent becomes ready or unready.
        """
        self.state = state
        self.number = number
        self.problem: str | None = None
        """Why its agent does not answer."""
        self._is_ready = False
        self._moved = moved
        self._shares: dict[str, Capacity] = {}
        self._own = NOTHING
        # What others have taken, at the last poll and the one before: Ray's figures lag behind ours, and
        # one poll alone may count what was just given back as taken by others.
        self._foreign = self._before = self._of_others()
        self.free = self._left()

    @property
    def node_id(self) -> str:
        return self.state.node_id

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def is_ready(self) -> bool:
        """Whether its agent answers."""
        return self._is_ready

    @is_ready.setter
    def is_ready(self, is_ready: bool) -> None:
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._moved(self)

    def see(self, state: NodeState) -> None:
        """Apply what Ray reports of the node."""
        self.state = state
        self._before, self._foreign = self._foreign, self._of_others()
        self._count()

    def add(self, job_id: str, compute: Compute) -> None:
        self._shares[job_id] = Capacity(compute.cpu_m, compute.mem or 0, compute.gpu)
        self._own = self._own + self._shares[job_id]
        self._count()

    def remove(self, job_id: str) -> None:
        self._own = self._own - self._shares.pop(job_id)
        self._count()

    def _count(self) -> None:
        free = self._left()
        if free != self.free:
            self.free = free
            self._moved(self)

    def _left(self) -> Capacity:
        others = self._foreign.least(self._before)
        return self.state.total - others - self._own

    def _of_others(self) -> Capacity:
        return (self.state.taken - self._own).most(NOTHING)


class _Selection:
    """The ready nodes with certain labels. Nodes with GPUs are for jobs without GPUs the last choice."""

    def __init__(self, wanted: Mapping[str, tuple[str, ...]]) -> None:
        self._wanted = wanted
        self._plain: CapacityIndex[Node] = CapacityIndex()
        self._with_gpus: CapacityIndex[Node] = CapacityIndex()

    def see(self, node: Node, *, is_there: bool) -> None:
        self._plain.drop(node.number)
        self._with_gpus.drop(node.number)
        if is_there and selects(self._wanted, node.state.labels):
            shelf = self._with_gpus if node.state.total.gpu else self._plain
            shelf.put(node.number, node.free, node)

    def best(self, compute: Compute) -> Node | None:
        return self._plain.first(compute) or self._with_gpus.first(compute)

    @property
    def is_empty(self) -> bool:
        return self._plain.is_empty and self._with_gpus.is_empty

    @property
    def most(self) -> Capacity:
        shelves = [each.most for each in (self._plain, self._with_gpus) if not each.is_empty]
        return shelves[0].most(shelves[-1])


class Placement:
    """All nodes of the cluster, and the largest that it ever had. A `CapacityLedger`."""

    def __init__(self, report_freed: Callable[[], object] = lambda: None) -> None:
        """
        Args:
            report_freed: called when `release` has freed capacity and a reservation was refused before.
        """
        self._report_freed = report_freed
        self.alive: dict[str, Node] = {}
        self._numbers = count()
        self._holders: dict[str, Node] = {}  # by job
        self._selections: dict[Labels, _Selection] = {}
        self._known: set[tuple[Capacity, tuple[tuple[str, str], ...]]] = set()
        self._refusals: dict[tuple[Capacity, Labels], str | None] = {}
        self._has_refused = False

    @property
    def total(self) -> Capacity:
        return sum((node.state.total for node in self.alive.values()), NOTHING)

    def update(self, states: tuple[NodeState, ...]) -> list[Node]:
        """Apply what Ray reports of all nodes; the nodes that have left the cluster."""
        told = {state.node_id: state for state in states if state.is_alive}
        lost = [node for node_id, node in self.alive.items() if node_id not in told]
        for node in lost:
            del self.alive[node.node_id]
            self._moved(node)
        for node_id, state in told.items():
            self._know(state)
            if node_id in self.alive:
                self.alive[node_id].see(state)
            else:
                self.alive[node_id] = Node(state, next(self._numbers), self._moved)
        return lost

    def refusal(self, compute: Compute) -> str | None:
        """See `CapacityLedger.refusal`. A node that has left the cluster may come back."""
        key = _asked(compute), _wanted(compute)
        if key not in self._refusals:
            self._refusals[key] = self._why_never(compute)
        return self._refusals[key]

    def reserve(self, job_id: str, compute: Compute) -> str | None:
        """See `CapacityLedger.reserve`. The job runs on `node_of` it."""
        if job_id in self._holders:
            return None
        selection = self._selection(compute)
        best = selection.best(compute)
        if best is not None:
            self.reserve_granted(job_id, compute, best.node_id)
            return None
        self._has_refused = True
        if selection.is_empty:
            return self._why_none(compute)
        named = _named(compute)
        return (
            lacking(compute, selection.most, f"{{}} free on one node{named}")
            or f"no node{named} has {amounts(compute)} free"
        )

    def reserve_granted(self, job_id: str, compute: Compute, node_id: str) -> None:
        """Count what a job has of a node already, even if that exceeds what is free."""
        node = self.alive.get(node_id)
        if node is not None and job_id not in self._holders:
            node.add(job_id, compute)
            self._holders[job_id] = node

    def node_of(self, job_id: str) -> Node | None:
        """The node of which a job has reserved a share."""
        return self._holders.get(job_id)

    def release(self, job_id: str) -> None:
        """See `CapacityLedger.release`. This engine prepares nothing that must be undone."""
        if self.give_back(job_id) and self.pop_refused():
            self._report_freed()

    def give_back(self, job_id: str) -> bool:
        """Give back the reservation of a job; whether it had one."""
        node = self._holders.pop(job_id, None)
        if node is None:
            return False
        node.remove(job_id)
        return True

    def pop_refused(self) -> bool:
        """Whether a reservation was refused since the last call."""
        has_refused, self._has_refused = self._has_refused, False
        return has_refused

    def nodes(self) -> list[NodeInfo]:
        """See `CapacityLedger.nodes`."""
        return [
            NodeInfo(
                node.name,
                node.is_ready,
                node.state.total,
                node.free,
                node.problem,
                node.state.labels,
            )
            for node in self.alive.values()
        ]

    def _moved(self, node: Node) -> None:
        is_there = node.is_ready and self.alive.get(node.node_id) is node
        for selection in self._selections.values():
            selection.see(node, is_there=is_there)

    def _selection(self, compute: Compute) -> _Selection:
        wanted = _wanted(compute)
        found = self._selections.get(wanted)
        if found is None:
            found = self._selections[wanted] = _Selection(compute.node_labels)
            for node in self.alive.values():
                found.see(node, is_there=node.is_ready)
        return found

    def _know(self, state: NodeState) -> None:
        kind = state.total, tuple(sorted(state.labels.items()))
        if kind not in self._known:
            self._known.add(kind)
            self._refusals.clear()

    def _why_never(self, compute: Compute) -> str | None:
        if not self._known:
            return None
        there = [
            total for total, labels in self._known if selects(compute.node_labels, dict(labels))
        ]
        if any(fits(compute, total) for total in there):
            return None
        named = _named(compute)
        if not there:
            return f"needs a node{named}, and there is none"
        most = there[0]
        for total in there:
            most = most.most(total)
        return (
            lacking(compute, most, f"the largest node{named} has {{}}")
            or f"no node{named} has {amounts(compute)}"
        )

    def _why_none(self, compute: Compute) -> str:
        if not self.alive:
            return "waits for a node: the cluster has none now"
        nodes = [
            node for node in self.alive.values() if selects(compute.node_labels, node.state.labels)
        ]
        if not nodes:
            return f"waits for a node{_named(compute)}: the cluster has none now"
        problems = {node.problem for node in nodes if node.problem}
        words = f": {sorted(problems)[0]}" if problems else ""
        return f"waits for a node{_named(compute)} whose agent answers{words}"


def _asked(compute: Compute) -> Capacity:
    return Capacity(compute.cpu_m, compute.mem or 0, compute.gpu)


def _wanted(compute: Compute) -> Labels:
    return tuple(sorted(compute.node_labels.items())) if compute.node_labels else ()


def _named(compute: Compute) -> str:
    return f" with {label_words(compute.node_labels)}" if compute.node_labels else ""
