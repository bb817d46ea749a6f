"""Jobs that no machine of the operator can ever run: the deploy warns, and each submit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from operator_harness import PROBE, Operator, operator, probe_yaml

FILES = {"probe.py": PROBE}
TOO_MUCH = {
    "cpu: 2": "needs 2 CPU, this machine has 1",
    "cpu: 1m, mem: 900Ti": "needs 900 TiB, this machine has ",
    "gpu: 999": "needs 999 GPUs, this machine has 0",
    "cpu: 1m, node_labels: {zone: b}": "needs a node with zone=b: labels are those of a cluster's",
}


def yaml_with(compute: str, name: str = "probe") -> str:
    return probe_yaml(name).replace("cpu: 1m", compute)


def deployed(own_operator: Operator, yaml: str) -> list[Any]:
    response = own_operator.deploy(yaml, FILES)
    assert response.status_code == 200, response.text
    answers: list[Any] = response.json()
    return answers


@pytest.mark.parametrize("compute", TOO_MUCH)
def test_a_deploy_warns_and_each_submit_is_refused_until_the_api_fits(
    own_operator: Operator, compute: str
) -> None:
    yaml = probe_yaml("small") + yaml_with(compute)
    small, large = deployed(own_operator, yaml)
    assert (small["warnings"], small["error"], large["error"]) == ([], "", "")
    [warning] = large["warnings"]
    assert warning.startswith(f"no job of 'probe' can run here: {TOO_MUCH[compute]}")
    assert large["message"] == f"created probe\nwarning: {warning}"
    [again] = deployed(own_operator, yaml)[1:]
    assert again["message"] == f"probe is unchanged\nwarning: {warning}"

    endpoint = large["api"]["endpoint"]
    for url in (
        endpoint,
        f"{own_operator.url}/tasks/probe",
        f"{own_operator.url}/-/apis/probe/jobs",
    ):
        for headers in ({}, {"Idempotency-Key": "once"}):
            refused = own_operator.http.post(url, json={}, headers=headers)
            assert (refused.status_code, refused.json()["kind"]) == (409, "conflict")
            assert refused.json()["message"].startswith(f"{warning}. Nothing was stored; ")
    assert own_operator.http.get(endpoint).json()["job_statuses"] == []
    assert own_operator.run(small["api"]["endpoint"])["status"] == "status_succeeded"

    [small, fits] = deployed(own_operator, yaml.replace(compute, "cpu: 1"))
    assert fits["warnings"] == []
    assert own_operator.run(fits["api"]["endpoint"])["status"] == "status_succeeded"


def test_jobs_that_were_stored_on_a_larger_machine_are_found_by_their_key(tmp_path: Path) -> None:
    with operator(tmp_path, "--cpu", "4") as running:
        endpoint = running.deployed(yaml_with("cpu: 4"), FILES)
        first = running.submit(endpoint, config={"do": "sleep", "s": 300})
        running.await_log(endpoint, first, "asleep")
        key = {"Idempotency-Key": "mine"}
        stored = running.http.post(endpoint, json={}, headers=key).json()
        running.kill()
        running.options = ("--cpu", "3")
        running.start()
        endpoint = f"{running.url}/probe"

        def answer(body: dict[str, Any], key: str) -> tuple[int, Any]:
            response = running.http.post(endpoint, json=body, headers={"Idempotency-Key": key})
            return response.status_code, response.json()

        assert answer({}, "mine") == (200, stored)
        status, other = answer({"config": {"a": 1}}, "mine")
        assert (status, "another body" in other["message"]) == (409, True)
        status, new = answer({}, "new")
        assert (status, "needs 4 CPU, this machine has 3" in new["message"]) == (409, True)
        # What was accepted has a status: the waiting job is refused, the running one goes on.
        assert running.status(endpoint, first)["status"] == "status_running"
        assert running.delete(endpoint, first).status_code == 200
        done = running.finished(endpoint, stored)
        assert done["status"] == "status_unexpected_error"
        assert done["message"] == "needs 4 CPU, this machine has 3"
