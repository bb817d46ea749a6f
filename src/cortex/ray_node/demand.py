"""The demand of waiting jobs, in a form that Ray's autoscaler reads: placement groups that wait.

The driver calls this module. A group is Ray's own way to wait for capacity: the autoscaler counts
it beside what is in use, for itself alone, with its labels, and Ray removes it with the driver.
`ray.autoscaler.sdk.request_resources` has none of that: one list for the whole cluster, which the
next caller replaces and which outlives its caller; jobs that run would have to be in it; and if one
entry cannot be met, the autoscaler ignores the list.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from cortex.engines.ray.messages import Wanted
from cortex.ray_node.reservations import NODE_ID, alive_nodes, bundle

_SMALLEST = {"CPU": 0.001}  # Ray has no empty bundles


class Demand:
    """The groups of this driver. Its methods block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nodes: frozenset[str] = frozenset()
        self._groups: dict[Wanted, list[PlacementGroup]] = {}

    def replace(self, wanted: Iterable[Wanted]) -> None:
        """Wait for this capacity, and no longer for what an earlier call has named.

        Raises:
            RayError: the cluster does not answer.
        """
        with self._lock:
            nodes = alive_nodes()
            if nodes - self._nodes:
                # A new node may have met some of the groups, which must not keep what they got.
                self._remove_all()
            self._nodes = nodes
            surplus, self._groups = self._groups, {}
            for each in wanted:
                group = surplus[each].pop() if surplus.get(each) else self._make(each)
                if group is not None:
                    self._groups.setdefault(each, []).append(group)
            for groups in surplus.values():
                for group in groups:
                    remove_placement_group(group)

    def _make(self, wanted: Wanted) -> PlacementGroup | None:
        labels = {name: f"in({','.join(values)})" for name, values in wanted.labels}
        if NODE_ID in labels:
            return None  # it names nodes: a new one is none of them
        # On none of the nodes that are there: Ray would give it the next capacity that a job
        # releases, for which the job itself waits.
        selector = {**labels, NODE_ID: f"!in({','.join(sorted(self._nodes))})"}
        group: PlacementGroup = placement_group(
            [bundle(wanted.amount) or _SMALLEST], bundle_label_selector=[selector]
        )
        return group

    def _remove_all(self) -> None:
        groups, self._groups = self._groups, {}
        for each in groups.values():
            for group in each:
                remove_placement_group(group)
