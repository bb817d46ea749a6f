"""What users are promised while a machine hangs, is cut off or is lost.

Ray has its default health settings here: it declares a node dead that has not answered for about
a minute. Until then, only Cortex can know that the node takes no jobs.
"""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

import httpx
import pytest

from cluster.machines import GCS, HEAD, RAYLET, TASK, Machines, seconds_until, task_yaml
from operator_harness import Operator, until

pytestmark = pytest.mark.cluster

START_LIMIT_S = 15  # jobs for other nodes are promised to start within 5 s; this machine is slow
NOTICE_LIMIT_S = 30  # of a node that does not answer; Ray needs twice as long at least
DEATH_LIMIT_S = 150  # after which Ray has declared a silent node dead
REQUEST_LIMIT_S = 30
SMALL = "100m"
APIS = "".join(
    [
        task_yaml("anywhere", cpu=SMALL),
        task_yaml("in-a", "a", cpu=SMALL),
        task_yaml("in-b", "b", cpu=SMALL),
        task_yaml("again-in-b", "b", cpu=SMALL, retries=1),
        task_yaml("fills-a", "a", cpu="2"),
    ]
)
# A reason is a sentence for users: no text of gRPC, no colours, no place in a source file.
NOISE = re.compile(r"\x1b|rpc_code|grpc|\.cc:\d|\.py:\d|Traceback|ray::|call_agent|Error\b")


class Jobs:
    """The jobs of one test, by the operator that it asks."""

    def __init__(self, cluster: Machines, running: Operator) -> None:
        self.cluster = cluster
        self.running = running
        running.deployed(APIS, {"task.py": TASK})

    def submit(self, api: str, go: str | None = None) -> Any:
        """Submit a job, which waits for `release(go)` if there is one."""
        return self.running.submit(self._at(api), config=self.cluster.config(go))

    def status(self, job: Any) -> Any:
        return self.running.status(self._at(job["api_name"]), job)

    def has(self, job: Any, status: str) -> bool:
        return bool(self.status(job)["status"] == status)

    def finished(self, job: Any) -> Any:
        return self.running.finished(self._at(job["api_name"]), job)

    def stop(self, job: Any) -> None:
        assert self.running.delete(self._at(job["api_name"]), job).status_code == 200

    def starts(self, job: Any) -> list[list[str]]:
        """Attempt and machine of each start of a job's code."""
        return [mark[1:] for mark in self.cluster.marks() if mark[0] == job["job_id"]]

    def await_start(self, job: Any, what: str) -> str:
        """Wait for the start of a job; its machine."""
        seconds_until(lambda: self.starts(job), START_LIMIT_S, f"{what} starts")
        return self.starts(job)[0][1]

    def warm(self, *apis: str) -> None:
        """Let nodes fetch the project and build its environment."""
        for api in apis:
            done = self.finished(self.submit(api))
            assert done["status"] == "status_succeeded", done

    def _at(self, api: str) -> str:
        return f"{self.running.url}/{api}"


def await_problem(cluster: Machines, running: Operator, name: str) -> str:
    """Wait until an operator shows a node as not ready; the reason."""
    seconds_until(
        lambda: not cluster.node(running, name)["is_ready"],
        NOTICE_LIMIT_S,
        f"{name} is shown as not ready",
    )
    problem = cluster.node(running, name)["problem"]
    assert problem, f"{name} is not ready, without a reason"
    assert not NOISE.search(problem), problem
    print(f"{name}: {problem}")
    return str(problem)


def test_a_hanging_raylet_delays_no_job_that_fits_another_node(cluster: Machines) -> None:
    running = cluster.start_operator("o1")
    cluster.await_ready(running, "n1", "n2")
    jobs = Jobs(cluster, running)
    jobs.warm("in-a", "in-b")
    with cluster.stopped("n1", RAYLET):
        first = [jobs.submit(api) for api in ("anywhere", "in-b", "anywhere", "in-b")]
        for job in first:
            jobs.await_start(job, f"a job {job['api_name']}")
        problem = await_problem(cluster, running, "n1")
        assert "answer" in problem, problem
        waiting = jobs.submit("in-a")
        later = [jobs.submit("anywhere") for _ in range(4)]
        for job in later:
            assert jobs.await_start(job, "a job anywhere") == "n2"
        assert cluster.node(running, "n2")["is_ready"]
        if not jobs.starts(waiting):
            until(lambda: jobs.status(waiting).get("message"), "the job for n1 says why it waits")
            print(jobs.status(waiting)["message"])
    until(lambda: cluster.node(running, "n1")["is_ready"], "n1 is ready again")
    assert cluster.node(running, "n1")["problem"] is None
    last = jobs.submit("in-a")
    for job in (*first, *later, waiting, last):
        assert jobs.finished(job)["status"] == "status_succeeded"
        assert len(jobs.starts(job)) == 1, jobs.starts(job)
    assert jobs.starts(last) == [["1", "n1"]]


def test_a_node_that_is_cut_off_loses_its_jobs_only_when_ray_declares_it_dead(
    cluster: Machines,
) -> None:
    running = cluster.start_operator("o1")
    cluster.await_ready(running, "n1", "n2")
    jobs = Jobs(cluster, running)
    jobs.warm("in-a", "in-b")
    retried, lost = jobs.submit("again-in-b", "go"), jobs.submit("in-b", "go")
    for job in (retried, lost):
        assert jobs.await_start(job, "a job in zone b") == "n2"
    cluster.add_node("n3", labels="zone=b")
    cluster.await_ready(running, "n3")
    with cluster.cut("n2"):
        for api in ("anywhere", "in-a", "in-b", "anywhere"):
            machine = jobs.await_start(jobs.submit(api), f"a job {api}")
            assert machine != "n2", "no job reaches a machine without a link"
        await_problem(cluster, running, "n2")
        for job in (retried, lost):
            until(partial(jobs.has, job, "status_unknown"), "it is unknown")
            message = jobs.status(job).get("message")
            assert message and not NOISE.search(message), message
            print(message)

        while jobs.status(lost)["status"] == "status_unknown":
            time.sleep(0.5)
        assert "n2" not in cluster.alive(), "the job is lost, and Ray has its node as alive"
        done = jobs.finished(lost)
        assert done["status"] == "status_unexpected_error"
        assert re.search("n2 was lost", done["message"]), done
        until(lambda: len(jobs.starts(retried)) == 2, "the job has a new attempt")
        assert jobs.starts(retried) == [["1", "n2"], ["2", "n3"]]
        cluster.release("go")
        done = jobs.finished(retried)
        assert (done["status"], done["result"]) == ("status_succeeded", "n3")
    assert jobs.starts(retried) == [["1", "n2"], ["2", "n3"]]
    assert jobs.starts(lost) == [["1", "n2"]]


def test_a_job_of_a_node_that_is_cut_off_for_a_moment_continues(cluster: Machines) -> None:
    running = cluster.start_operator("o1")
    cluster.await_ready(running, "n1", "n2")
    jobs = Jobs(cluster, running)
    jobs.warm("in-a", "in-b")
    job = jobs.submit("again-in-b", "go")
    jobs.await_start(job, "a job in zone b")
    with cluster.cut("n2"):
        await_problem(cluster, running, "n2")
        seconds_until(
            partial(jobs.has, job, "status_unknown"), NOTICE_LIMIT_S, "the job is unknown"
        )
        cluster.release("go")  # it ends while the operator cannot know
    done = jobs.finished(job)
    assert (done["status"], done["result"]) == ("status_succeeded", "n2")
    assert jobs.starts(job) == [["1", "n2"]]
    until(lambda: cluster.node(running, "n2")["is_ready"], "n2 is ready again")
    assert jobs.finished(jobs.submit("in-b"))["result"] == "n2"


def test_jobs_leave_out_a_node_whose_packets_do_not_reach_the_operator(cluster: Machines) -> None:
    running = cluster.start_operator("o1")
    cluster.await_ready(running, "n1", "n2")
    jobs = Jobs(cluster, running)
    jobs.warm("in-b")
    cluster.network.cut_direction("n1", "o1")
    waiting = jobs.submit("in-a")
    for _ in range(4):
        assert jobs.await_start(jobs.submit("anywhere"), "a job anywhere") == "n2"
    await_problem(cluster, running, "n1")
    until(lambda: jobs.status(waiting).get("message"), "the job for n1 says why it waits")
    message = jobs.status(waiting)["message"]
    print(message)
    assert re.search("n1|zone=a", message), message
    assert not NOISE.search(message), message
    assert jobs.status(waiting)["status"] in ("status_running", "status_unknown")
    assert jobs.starts(waiting) == []
    cluster.network.heal("n1")
    done = jobs.finished(waiting)
    assert (done["status"], done["result"]) == ("status_succeeded", "n1")
    assert jobs.starts(waiting) == [["1", "n1"]]


def test_a_node_that_can_open_no_connection_to_the_operator_runs_jobs_or_says_why_not(
    cluster: Machines,
) -> None:
    cluster.network.add("o1")
    cluster.network.refuse_connections("n1", "o1")
    running = cluster.start_operator("o1")
    cluster.await_ready(running, "n2")
    jobs = Jobs(cluster, running)
    jobs.warm("in-b")
    special = jobs.submit("in-a")
    for _ in range(4):
        jobs.await_start(jobs.submit("anywhere"), "a job anywhere")

    def is_explained() -> bool:
        status = jobs.status(special)
        return bool(jobs.starts(special) or re.search("n1|zone=a", status.get("message", "")))

    seconds_until(is_explained, 2 * NOTICE_LIMIT_S, "the job for n1 runs or says why not")
    print(jobs.status(special))
    cluster.network.heal("n1")
    assert jobs.finished(special)["status"] == "status_succeeded"
    assert jobs.starts(special) == [["1", "n1"]]


def test_a_job_for_an_absent_zone_delays_no_other(cluster: Machines) -> None:
    running = cluster.start_operator("o1")
    cluster.await_ready(running, "n1", "n2")
    jobs = Jobs(cluster, running)
    jobs.warm("in-a", "in-b")
    cluster.kill_node("n2")
    until(
        lambda: (
            cluster.node(running, "n2")["problem"] or not cluster.node(running, "n2")["is_ready"]
        ),
        "n2 is away",
    )
    waiting = [jobs.submit("in-b") for _ in range(3)]
    for api in ("anywhere", "in-a", "anywhere", "fills-a"):
        job = jobs.submit(api)
        assert jobs.await_start(job, f"a job {api}") == "n1"
        assert jobs.finished(job)["status"] == "status_succeeded"
    for job in waiting:
        assert "zone=b" in jobs.status(job)["message"], jobs.status(job)
        assert jobs.starts(job) == []
    cluster.start_node("n2")
    for job in waiting:
        done = jobs.finished(job)
        assert (done["status"], done["result"]) == ("status_succeeded", "n2")


def leads(running: Operator) -> bool:
    """Whether an operator is the leader."""
    try:
        text = running.http.get(f"{running.url}/metrics", timeout=REQUEST_LIMIT_S).text
    except httpx.TransportError:
        return False
    return "cortex_operator_drives 1.0" in text.splitlines()


def test_a_standby_leads_while_the_head_hangs(cluster: Machines) -> None:
    first = cluster.start_operator("o1")
    standby = cluster.start_operator("o2")
    cluster.await_ready(first, "n1", "n2")
    until(lambda: leads(first), "the first operator leads")
    jobs = Jobs(cluster, first)
    jobs.warm("in-a", "in-b")
    running, ended = jobs.submit("in-a", "go"), jobs.submit("in-b")
    jobs.await_start(running, "a job in zone a")
    assert jobs.finished(ended)["status"] == "status_succeeded"
    with cluster.stopped(HEAD, GCS):
        first.kill()
        seconds_until(lambda: leads(standby), 2 * NOTICE_LIMIT_S, "the standby leads")
        standby.http.timeout = httpx.Timeout(REQUEST_LIMIT_S)
        jobs.running = standby
        assert jobs.status(ended)["status"] == "status_succeeded"
        assert jobs.status(running)["status"] in ("status_running", "status_unknown")
        waiting = jobs.submit("in-b")
        assert jobs.status(waiting)["status"] in ("status_running", "status_unknown")
        unwanted = jobs.submit("in-b")
        jobs.stop(unwanted)
        assert jobs.status(unwanted)["status"] == "status_stopped"
        listed = standby.http.get(f"{standby.url}/in-b").json()
        assert waiting["job_id"] in str(listed)
        assert standby.http.get(f"{standby.url}/readyz").status_code == 200
    cluster.release("go")
    standby.http.timeout = httpx.Timeout(DEATH_LIMIT_S)
    for job in (running, waiting):
        assert jobs.finished(job)["status"] == "status_succeeded"
        assert len(jobs.starts(job)) == 1
    assert jobs.starts(unwanted) == []
