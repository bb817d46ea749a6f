"""What Ray is asked of a cluster as a whole: its nodes, and placement groups that hold what a job takes
while it runs. Called by the driver in threads, for all of it blocks; and by agents, to give back.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # there is no public call for it
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.ray.messages import NodeState, Reservation
from cortex.spec.api import MILLI

NODE_ID = "ray.io/node-id"  # a label that each node has, and no two the same


class Taken(Exception):
    """Ray did not give what was there a moment ago."""


def look() -> tuple[NodeState, ...]:
    """All nodes, and what is taken of each."""
    states = ray.nodes()  # type: ignore[no-untyped-call]  # Ray types a part of itself
    available = available_resources_per_node()  # type: ignore[no-untyped-call]  # likewise
    return tuple(_state(each, available) for each in states)


def take(seat: Reservation, within_s: float) -> tuple[int, ...]:
    """Let Ray hold a bundle on one node; the GPUs that it gave.

    Raises:
        Taken: it does not give it now. It may yet: the caller lets go of it.
    """
    group = placement_group(
        [seat.bundle],
        name=seat.name,
        lifetime="detached",
        bundle_label_selector=[{NODE_ID: seat.node_id}],
    )
    if not group.wait(within_s):
        raise Taken("others took what its node had free")
    return _gpus(group, seat, within_s) if seat.bundle.get("GPU") else ()


def let_go(name: str) -> None:
    """Give a seat back. Harmless for one that is gone.

    Raises:
        RayError: the cluster cannot be asked now.
    """
    with contextlib.suppress(ValueError):  # there is none of that name
        remove_placement_group(get_placement_group(name))


def _gpus(group: PlacementGroup, seat: Reservation, within_s: float) -> tuple[int, ...]:
    """A bundle has its own GPUs, and tells them to whatever runs in it."""
    count = seat.bundle["GPU"]
    task = ray.remote(_own_gpus).options(
        num_cpus=0,
        num_gpus=count,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    try:
        found = ray.get(task.remote(), timeout=within_s)
    except ray.exceptions.RayError as error:
        raise Taken(f"its GPUs could not be told: {error}") from error
    return tuple(int(each) for each in found)


def _own_gpus() -> list[Any]:
    return list(ray.get_gpu_ids())


def _state(told: dict[str, Any], available: dict[str, dict[str, float]]) -> NodeState:
    node_id = told["NodeID"]
    name = told["NodeManagerHostname"] or told["NodeManagerAddress"]
    if not told["Alive"]:
        return NodeState(node_id, name, False, NOTHING, NOTHING)
    total = _capacity(told["Resources"])
    free = _capacity(available[node_id]) if node_id in available else total
    labels = {key: value for key, value in told["Labels"].items() if key != NODE_ID}
    return NodeState(node_id, name, True, total, total - free, labels)


def _capacity(resources: dict[str, float]) -> Capacity:
    return Capacity(
        cpu_m=round(resources.get("CPU", 0) * MILLI),
        mem=int(resources.get("memory", 0)),
        gpu=int(resources.get("GPU", 0)),
    )
