"""Ray's nodes, and its placement groups, which reserve what the jobs of this operator take.

All functions block. Agents reserve (`node_reservations`); the driver reads the nodes, and releases
what lost nodes have left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray

# Ray has no public functions for them.
from ray._private.state import available_resources_per_node, state
from ray.util import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.ray.messages import Drain, NodeState
from cortex.spec.quantities import MILLI
from cortex.worker.messages import shorten

NODE_ID = "ray.io/node-id"  # a label that each node has, with a unique value
# Of `NodeDeathInfo.Reason`: SIGTERM to the raylet, the end of a drain, a node that was idle.
_ENDED_ON_PURPOSE = frozenset({1, 3, 4})


@dataclass(frozen=True)
class Reservation:
    """A placement group of one bundle on one node."""

    name: str
    amount: Capacity
    is_created: bool
    """False while Ray waits for capacity that others have taken."""
    node_id: str = ""
    """Where it is, once it is created."""


def node_states() -> tuple[NodeState, ...]:
    """All nodes, and what is taken of each."""
    deadlines_ms = state.get_draining_nodes()
    states = ray.nodes()  # type: ignore[no-untyped-call]  # Ray types a part of itself
    available = available_resources_per_node()  # type: ignore[no-untyped-call]  # the same
    return tuple(_state(each, available, deadlines_ms.get(each["NodeID"])) for each in states)


def alive_nodes() -> frozenset[str]:
    """The ids of the nodes that are alive."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray types a part of itself
    return frozenset(str(each["NodeID"]) for each in nodes if each["Alive"])


def raylet_address(node_id: str) -> tuple[str, int]:
    """The host and the port of a node's raylet.

    Raises:
        LookupError: the node is not in the cluster.
    """
    for fields in ray.nodes():  # type: ignore[no-untyped-call]  # Ray types a part of itself
        if fields["NodeID"] == node_id:
            return fields["NodeManagerAddress"], int(fields["NodeManagerPort"])
    raise LookupError(f"the cluster has no node {node_id}")


def create(name: str, node_id: str, amount: Capacity, timeout_s: float) -> bool:
    """Reserve an amount on a node.

    Returns:
        Whether Ray has made the reservation in time. It may make it later: see `find`.

    Raises:
        RayError: the cluster does not answer; Ray may make the reservation all the same.
    """
    group = placement_group(
        [bundle(amount)],
        name=name,
        lifetime="detached",
        bundle_label_selector=[{NODE_ID: node_id}],
    )
    return bool(group.wait(timeout_s))


def find(name: str) -> Reservation | None:
    """A reservation, if it exists.

    Raises:
        RayError: the cluster does not answer.
    """
    try:
        fields = placement_group_table(get_placement_group(name))
    except ValueError:  # there is no placement group of that name
        return None
    return _reservation(fields) if fields and fields["state"] != "REMOVED" else None


def existing(prefix: str) -> list[Reservation]:
    """The reservations whose names begin with `prefix`.

    Raises:
        RayError: the cluster does not answer.
    """
    tables: Iterable[dict[str, Any]] = placement_group_table().values()
    named = [each for each in tables if each["name"].startswith(prefix)]
    return [_reservation(each) for each in named if each["state"] != "REMOVED"]


def release(name: str) -> None:
    """Release a reservation, if it exists.

    Raises:
        RayError: the cluster does not answer.
    """
    with contextlib.suppress(ValueError):  # there is no placement group of that name
        remove_placement_group(get_placement_group(name))


def release_lost(prefix: str) -> None:
    """Release the reservations whose names begin with `prefix` and go on with a node's id, unless
    that node is alive. Where the names go on with a job's id, as before version 2 of the messages,
    those on nodes that are alive stay: the agents release them.

    Raises:
        RayError: the cluster does not answer.
    """
    found = existing(prefix)
    # Read last: a node that has joined meanwhile may have made reservations.
    alive = alive_nodes()
    for each in found:
        named_node = each.name.removeprefix(prefix).partition(":")[0]
        if named_node not in alive and each.node_id not in alive:
            release(each.name)


def reserved_gpus(name: str, count: int, timeout_s: float) -> tuple[int, ...]:
    """The indices of the GPUs of a reservation, which Ray reveals only to a task that runs in it.

    Raises:
        RayError: Ray has not run the task in time.
        ValueError: there is no reservation of that name.
    """
    task = ray.remote(_own_gpus).options(
        num_cpus=0,
        num_gpus=count,
        scheduling_strategy=PlacementGroupSchedulingStrategy(get_placement_group(name)),
    )
    return tuple(int(gpu_id) for gpu_id in ray.get(task.remote(), timeout=timeout_s))


def _own_gpus() -> list[Any]:
    return list(ray.get_gpu_ids())


def _reservation(fields: dict[str, Any]) -> Reservation:
    bundles = fields["bundles"].values()
    amount = sum((_capacity(each) for each in bundles), NOTHING)
    is_created = fields["state"] == "CREATED"
    node_id = next(iter(fields["bundles_to_node_id"].values()), "") if is_created else ""
    return Reservation(fields["name"], amount, is_created, node_id)


def _state(
    fields: dict[str, Any], available: dict[str, dict[str, float]], deadline_ms: int | None
) -> NodeState:
    node_id = fields["NodeID"]
    name = fields["NodeManagerHostname"] or fields["NodeManagerAddress"]
    if not fields["Alive"]:
        reason, message = fields["DeathReason"], fields["DeathReasonMessage"]
        death = shorten(message, 300) if reason in _ENDED_ON_PURPOSE else ""
        return NodeState(node_id, name, False, NOTHING, NOTHING, death=death)
    total = _capacity(fields["Resources"])
    free = _capacity(available[node_id]) if node_id in available else total
    labels = {key: value for key, value in fields["Labels"].items() if key != NODE_ID}
    return NodeState(node_id, name, True, total, total - free, labels, _drain(deadline_ms))


def _drain(deadline_ms: int | None) -> Drain | None:
    """A drain with its deadline by the wall clock; 0 is none, and None is no drain."""
    if deadline_ms is None:
        return None
    return Drain(max(0.0, deadline_ms / 1000 - time.time()) if deadline_ms else None)


def bundle(amount: Capacity) -> dict[str, float]:
    """An amount in Ray's terms."""
    resources: dict[str, float] = {
        "CPU": amount.cpu_m / MILLI,
        "memory": amount.mem,
        "GPU": amount.gpu,
    }
    return {resource: value for resource, value in resources.items() if value}


def _capacity(resources: dict[str, float]) -> Capacity:
    return Capacity(
        cpu_m=round(resources.get("CPU", 0) * MILLI),
        mem=int(resources.get("memory", 0)),
        gpu=int(resources.get("GPU", 0)),
    )
