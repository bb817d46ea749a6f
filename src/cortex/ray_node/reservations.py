"""Ray's nodes, and its placement groups, which reserve what a job takes while it runs.

All functions block: the driver calls them in threads. Agents call only `release`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # Ray has no public function for it
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.ray.messages import NodeState, Reservation
from cortex.spec.quantities import MILLI

NODE_ID = "ray.io/node-id"  # a label that each node has, with a unique value


class ReservationFailed(Exception):
    """Ray refuses a reservation of capacity that was free a moment ago."""


def node_states() -> tuple[NodeState, ...]:
    """All nodes, and what is taken of each."""
    states = ray.nodes()  # type: ignore[no-untyped-call]  # Ray types a part of itself
    available = available_resources_per_node()  # type: ignore[no-untyped-call]  # the same
    return tuple(_state(each, available) for each in states)


def reserve(reservation: Reservation, timeout_s: float) -> tuple[int, ...]:
    """Reserve a bundle on one node.

    Returns:
        The GPUs of the bundle.

    Raises:
        ReservationFailed: Ray has not reserved it in time. It may do so later: the caller must call
            `release`.
    """
    group = placement_group(
        [reservation.bundle],
        name=reservation.name,
        lifetime="detached",
        bundle_label_selector=[{NODE_ID: reservation.node_id}],
    )
    if not group.wait(timeout_s):
        raise ReservationFailed("others have taken the free capacity of its node")
    return _gpus_of(group, reservation, timeout_s) if reservation.bundle.get("GPU") else ()


def release(name: str) -> None:
    """Release a reservation, if it exists.

    Raises:
        RayError: the cluster does not answer.
    """
    with contextlib.suppress(ValueError):  # there is no placement group of that name
        remove_placement_group(get_placement_group(name))


def _gpus_of(group: PlacementGroup, reservation: Reservation, timeout_s: float) -> tuple[int, ...]:
    """The GPUs of a bundle, which Ray reveals only to a task that runs in it."""
    count = reservation.bundle["GPU"]
    task = ray.remote(_own_gpus).options(
        num_cpus=0,
        num_gpus=count,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    try:
        gpu_ids = ray.get(task.remote(), timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise ReservationFailed(f"Ray did not report the reserved GPUs: {error}") from error
    return tuple(int(gpu_id) for gpu_id in gpu_ids)


def _own_gpus() -> list[Any]:
    return list(ray.get_gpu_ids())


def _state(fields: dict[str, Any], available: dict[str, dict[str, float]]) -> NodeState:
    node_id = fields["NodeID"]
    name = fields["NodeManagerHostname"] or fields["NodeManagerAddress"]
    if not fields["Alive"]:
        return NodeState(node_id, name, False, NOTHING, NOTHING)
    total = _capacity(fields["Resources"])
    free = _capacity(available[node_id]) if node_id in available else total
    labels = {key: value for key, value in fields["Labels"].items() if key != NODE_ID}
    return NodeState(node_id, name, True, total, total - free, labels)


def _capacity(resources: dict[str, float]) -> Capacity:
    return Capacity(
        cpu_m=round(resources.get("CPU", 0) * MILLI),
        mem=int(resources.get("memory", 0)),
        gpu=int(resources.get("GPU", 0)),
    )
