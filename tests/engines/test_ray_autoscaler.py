"""A cluster that grows for waiting jobs, and shrinks again, with Ray's own autoscaler: what it adds
are raylets on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.ray_cluster import MIB, RayCluster, absent_cluster
from operator_harness import PROBE, Operator, operator, probe_yaml, until

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

MEMORY = {"object_store_memory": 80 * MIB}
NODE_TYPES: dict[str, dict[str, object]] = {
    "plain": {"resources": {"CPU": 2, **MEMORY}, "node_config": {}, "max_workers": 2},
    "zoned": {
        "resources": {"CPU": 2, **MEMORY}, "node_config": {}, "max_workers": 2,
        "labels": {"zone": "b"},
    },
}  # fmt: skip


@pytest.fixture
def autoscaling() -> Iterator[RayCluster]:
    with absent_cluster() as made:
        made.start_autoscaling_head(NODE_TYPES)
        yield made


def test_the_cluster_grows_for_a_waiting_job_with_its_labels_and_shrinks_again(
    autoscaling: RayCluster, tmp_path: Path
) -> None:
    with operator(
        tmp_path / "operator",
        *("--engine", "ray", "--ray-address", autoscaling.address, "--ray-autoscaler"),
        *("--ray-node-dir", str(tmp_path / "nodes")),
    ) as running:
        yaml = probe_yaml("zoned").replace("cpu: 1m", "cpu: 2, node_labels: {zone: [a, b]}")
        endpoint = running.deployed(yaml, {"probe.py": PROBE})
        job = running.submit(endpoint)
        yaml = probe_yaml("huge").replace("cpu: 1m", "cpu: 1m, gpu: 9")
        huge_endpoint = running.deployed(yaml, {"probe.py": PROBE})
        huge = running.submit(huge_endpoint)  # it can never run, and must not keep others from it
        assert running.finished(endpoint, job)["status"] == "status_succeeded"
        until(
            lambda: (
                "autoscaler adds: needs 9 GPUs"
                in str(running.status(huge_endpoint, huge).get("message"))
            ),
            "the job says what it waits for",
        )
        assert {"zone": "b"} in labels(running)
        # Ray takes a node with an actor for a node that is used: the agent has to leave.
        until(lambda: labels(running) == [{}], "the idle node was removed")
        assert running.delete(huge_endpoint, huge).status_code == 200


def labels(running: Operator) -> list[dict[str, str]]:
    nodes = running.http.get(f"{running.url}/-/cluster").json()["nodes"]
    return [node["labels"] for node in nodes]
