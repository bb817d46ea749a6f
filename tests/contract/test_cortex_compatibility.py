"""The interface for clients of Cortex 0.27 to 0.42.

These are the routes `/tasks/<api>`, as inside a Cortex cluster, and the keys of Cortex's API spec.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from operator_harness import PROBE, Operator, operator, probe_yaml, until

SLEEP = {"do": "sleep", "s": 300}
MASK = "********"


def send(running: Operator, method: str, path: str, **more: Any) -> httpx.Response:
    return httpx.request(method, running.url + path, timeout=60, **more)


@pytest.mark.parametrize("form", ["/tasks/probe?jobID={}", "/tasks/probe/{}", "/tasks/probe/{}/"])
def test_tasks_routes_serve_a_job_by_the_name_of_its_api(
    shared_operator: Operator, probe: str, form: str
) -> None:
    job = send(shared_operator, "POST", "/tasks/probe", json={"config": SLEEP}).json()
    path = form.format(job["job_id"])
    answer = send(shared_operator, "GET", path).json()
    assert answer.keys() >= {"job_status", "endpoint", "api_spec"}
    assert answer["endpoint"] == f"{probe}/{job['job_id']}"
    assert answer["job_status"]["status"] == "status_running"
    assert send(shared_operator, "HEAD", path).status_code == 200
    stopped = send(shared_operator, "DELETE", path)
    assert stopped.json() == {"message": f"stopped job {job['job_id']}"}
    until(
        lambda: send(shared_operator, "GET", path).json() == shared_operator.get(probe, job),
        "the same answer",
    )


def test_tasks_routes_take_the_name_and_not_the_endpoint(shared_operator: Operator) -> None:
    more = "  networking: {endpoint: moved-away}\n"
    endpoint = shared_operator.deployed(probe_yaml("moved", more), {"probe.py": PROBE})
    job = send(shared_operator, "POST", "/tasks/moved/", json={}).json()
    assert shared_operator.finished(endpoint, job)["status"] == "status_succeeded"
    assert send(shared_operator, "GET", f"/tasks/moved/{job['job_id']}/logs").status_code == 200
    listed = send(shared_operator, "GET", "/tasks/moved", params={"limit": 1}).json()[
        "job_statuses"
    ]
    assert [each["job_id"] for each in listed] == [job["job_id"]]
    assert send(shared_operator, "POST", "/tasks/moved-away", json={}).status_code == 404
    shared_operator.http.delete(f"{shared_operator.url}/-/apis/moved")
    assert send(shared_operator, "POST", "/tasks/moved", json={}).status_code == 404
    assert send(shared_operator, "GET", f"/tasks/moved/{job['job_id']}").status_code == 200


def test_tasks_routes_refuse_unknown_names_and_missing_job_ids(
    shared_operator: Operator, probe: str
) -> None:
    for method, path in (("GET", "/tasks/nothing"), ("POST", "/tasks/nothing")):
        answer = send(shared_operator, method, path, json={})
        assert (answer.status_code, answer.json()["kind"]) == (404, "not_found")
        assert "'nothing'" in answer.json()["message"]
    for path in ("/tasks/nothing?jobID=1", "/tasks/probe/1", "/tasks/nothing/1/logs", "/tasks"):
        assert send(shared_operator, "GET", path).json()["kind"] == "not_found"
    for path in ("/tasks/probe", "/-/apis/probe/jobs"):
        answer = send(shared_operator, "DELETE", path)
        assert (answer.status_code, answer.json()["kind"]) == (400, "request.invalid")
        assert f"DELETE {path}/<job_id>" in answer.json()["message"]
    assert send(shared_operator, "DELETE", "/tasks/nothing").status_code == 404


@pytest.mark.parametrize(
    ("name", "more"), [("tasks", ""), ("at-tasks", "  networking: {endpoint: tasks}\n")]
)
def test_an_api_named_tasks_keeps_all_of_its_paths(
    shared_operator: Operator, probe: str, name: str, more: str
) -> None:
    endpoint = shared_operator.deployed(probe_yaml(name, more), {"probe.py": PROBE})
    assert endpoint == f"{shared_operator.url}/tasks"
    job = shared_operator.submit(endpoint, config=SLEEP)
    shared_operator.await_log(endpoint, job, "asleep")
    until(
        lambda: shared_operator.status(endpoint, job)["worker_counts"]["running"],
        "the status shows that the job runs",
    )
    by_path = send(shared_operator, "GET", f"/tasks/{job['job_id']}").json()
    assert by_path == send(shared_operator, "GET", f"/tasks?jobID={job['job_id']}").json()
    assert by_path["endpoint"] == f"{endpoint}/{job['job_id']}"
    assert send(shared_operator, "GET", f"/tasks/{job['job_id']}/logs").status_code == 200
    assert (
        send(shared_operator, "GET", "/tasks").json()["job_statuses"][0]["job_id"] == job["job_id"]
    )
    assert send(shared_operator, "DELETE", f"/tasks/{job['job_id']}").status_code == 200
    # Both APIs are also reachable by name.
    other = send(shared_operator, "POST", "/tasks/probe", json={}).json()
    assert other["api_name"] == "probe"
    assert send(shared_operator, "GET", f"/tasks/probe/{other['job_id']}").status_code == 200
    assert send(shared_operator, "POST", f"/tasks/{name}", json={}).json()["api_name"] == name
    assert send(shared_operator, "GET", f"/tasks/{other['job_id']}").status_code == 404
    shared_operator.http.delete(f"{shared_operator.url}/-/apis/{name}")
    assert send(shared_operator, "GET", f"/tasks/{job['job_id']}").status_code == 200


WRITTEN = """
- name: written
  kind: TaskAPI
  definition:
    path: probe.py
    config: {depth: 3}
    env: {TOKEN: marked}
  compute:
    cpu: %s
    mem: 512Mi
"""


def specs(running: Operator, endpoint: str) -> Iterator[Any]:
    """The API spec from every answer that contains it."""
    job = running.submit(endpoint)
    yield send(running, "GET", "/-/apis/written").json()[0]["spec"]
    yield next(
        each["spec"]
        for each in send(running, "GET", "/-/apis").json()
        if each["spec"]["name"] == "written"
    )
    yield running.get(endpoint, job)["api_spec"]
    yield send(running, "GET", f"/tasks/written/{job['job_id']}").json()["api_spec"]


@pytest.mark.parametrize(
    ("cpu", "shown", "cpu_m"),
    [("10m", "10m", 10), ("0.01", "0.01", 10), ('"0.01"', "0.01", 10), ("1", "1", 1000)],
)
def test_a_spec_has_the_keys_of_cortex_beside_ours(
    shared_operator: Operator, cpu: str, shown: str, cpu_m: int
) -> None:
    (deployed,) = shared_operator.deploy(WRITTEN % cpu, {"probe.py": PROBE}).json()
    endpoint = deployed["api"]["endpoint"]
    for spec in (deployed["api"]["spec"], *specs(shared_operator, endpoint)):
        assert spec["id"] == spec["spec_id"] == spec["api_id"]
        assert (spec["compute"]["cpu"], spec["compute"]["cpu_m"]) == (shown, cpu_m)
        assert spec["compute"]["mem"] == 512 << 20
        assert spec["submitted_api_spec"] == {
            "name": "written",
            "kind": "TaskAPI",
            "definition": {"path": "probe.py", "config": {"depth": 3}, "env": {"TOKEN": MASK}},
            "compute": {"cpu": {"0.01": 0.01, "1": 1}.get(cpu, shown), "mem": "512Mi"},
        }
    shared_operator.http.delete(f"{shared_operator.url}/-/apis/written")


def test_an_api_without_compute_shows_the_default(shared_operator: Operator) -> None:
    yaml = "- name: defaults\n  kind: TaskAPI\n  definition: {path: probe.py}\n"
    (deployed,) = shared_operator.deploy(yaml, {"probe.py": PROBE}).json()
    spec = deployed["api"]["spec"]
    assert (spec["compute"]["cpu"], spec["compute"]["cpu_m"]) == ("200m", 200)
    assert "compute" not in spec["submitted_api_spec"]


def test_a_version_of_an_older_operator_has_the_keys_of_cortex(tmp_path: Path) -> None:
    with operator(tmp_path) as running:
        files = {"probe.py": PROBE}
        endpoint = running.deployed(WRITTEN % "10m", files)
        running.kill()
        with closing(sqlite3.connect(running.data_dir / "operator.db")) as database:
            (stored,) = database.execute("SELECT spec FROM versions").fetchone()
            old = json.loads(stored)
            del old["submitted_api_spec"]
            database.execute("UPDATE versions SET spec = ?", (json.dumps(old),))
            database.commit()
        running.start()
        for spec in specs(running, endpoint.replace(endpoint.rpartition("/")[0], running.url)):
            assert spec["id"] == spec["spec_id"] == spec["api_id"]
            assert spec["compute"]["cpu"] == "10m"
            assert spec["definition"]["env"] == {"TOKEN": MASK}
            assert spec["submitted_api_spec"] == {
                "name": "written",
                "kind": "TaskAPI",
                "definition": {"path": "probe.py", "config": {"depth": 3}, "env": {"TOKEN": MASK}},
                "networking": {"endpoint": "written"},
                "compute": {"cpu": "10m", "mem": 512 << 20},
            }
        (again,) = running.deploy(WRITTEN % "10m", files).json()
        assert again["message"] == "written is unchanged"
