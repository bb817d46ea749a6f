"""`retries`: a job whose processes were lost gets a new attempt, and no other job does."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import pytest

from operator_harness import Operator, until

CODE = """
import os, signal, time

def task(config):
    print("started", os.environ["CORTEX_ATTEMPT"], os.getpid(), flush=True)
    if config.get("end") == "raise":
        raise ValueError("as asked")
    if config.get("end") == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.get("end") == "hungry":
        hoard = []
        while True:
            hoard.append(bytearray(b"x") * (4 << 20))
    marker = os.path.join(os.environ["CORTEX_JOB_DIR"], "attempted")
    is_repeated = os.path.exists(marker)
    open(marker, "w").close()
    if not is_repeated:
        print("asleep", flush=True)
        time.sleep(300)
    return int(os.environ["CORTEX_ATTEMPT"])
"""
YAML = """
- name: again
  kind: TaskAPI
  definition: {path: task.py}
  compute: {cpu: 1m, mem: 96Mi}
  retries: RETRIES
"""


def deploy(operator: Operator, retries: int = 1) -> str:
    return operator.deployed(YAML.replace("RETRIES", str(retries)), {"task.py": CODE})


def lose(operator: Operator, endpoint: str, job: Any, attempt: int = 1) -> None:
    """Kill the job's supervisor and its process, as the loss of a machine does."""
    line = re.compile(rf"started {attempt} \d+\n")
    until(lambda: line.search(operator.log_of(endpoint, job)), "the attempt has started")
    words = operator.log_of(endpoint, job).split()
    worker = int(words[len(words) - 1 - words[::-1].index("started") + 2])
    start = operator.data_dir / "jobs" / job["job_id"] / f"start.{attempt}"
    for pid in (int(json.loads(start.read_bytes())["pid"]), worker):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has exited with its supervisor


def test_a_lost_job_is_retried_and_its_log_reports_the_loss(shared_operator: Operator) -> None:
    endpoint = deploy(shared_operator)
    job = shared_operator.submit(endpoint)
    shared_operator.await_log(endpoint, job, "asleep")
    lose(shared_operator, endpoint, job)
    done = shared_operator.finished(endpoint, job)
    assert (done["status"], done["result"]) == ("status_succeeded", 2)
    assert "message" not in done
    lines = shared_operator.log_of(endpoint, job).splitlines()
    assert lines[0].startswith("started 1")
    words = "attempt 1 was lost: the supervisor was killed; attempt 2 begins"
    assert lines[2] == f"cortex: {words}"
    assert lines[3].startswith("started 2")


def test_the_status_reports_the_loss_while_the_next_attempt_runs(
    shared_operator: Operator,
) -> None:
    endpoint = deploy(shared_operator)
    job = shared_operator.submit(endpoint, config={"base": 1})
    marker = shared_operator.data_dir / "jobs" / job["job_id"] / "files" / "attempted"
    shared_operator.await_log(endpoint, job, "asleep")
    marker.unlink()  # the next attempt sleeps again
    lose(shared_operator, endpoint, job)
    shared_operator.await_log(endpoint, job, "started 2")
    until(
        lambda: (
            shared_operator.status(endpoint, job)["worker_counts"] == {"pending": 0, "running": 1}
        ),
        "the status shows that the next attempt runs",
    )
    status = shared_operator.status(endpoint, job)
    assert status["status"] == "status_running"
    assert status["message"] == "attempt 1 was lost: the supervisor was killed"
    assert status["created_time"] < status["start_time"]
    assert shared_operator.delete(endpoint, job).status_code == 200
    assert shared_operator.status(endpoint, job)["message"] == "stopped by a user"


def test_a_job_lost_more_often_than_retries_is_an_unexpected_error(
    shared_operator: Operator,
) -> None:
    endpoint = deploy(shared_operator, 0)
    job = shared_operator.submit(endpoint)
    lose(shared_operator, endpoint, job)
    done = shared_operator.finished(endpoint, job)
    assert done["status"] == "status_unexpected_error"
    assert done["message"] == "the supervisor was killed"
    assert "attempt" not in shared_operator.log_of(endpoint, job)


def test_a_terminated_supervisor_is_a_loss(shared_operator: Operator) -> None:
    """A machine that shuts down sends SIGTERM to all processes."""
    endpoint = deploy(shared_operator)
    job = shared_operator.submit(endpoint)
    shared_operator.await_log(endpoint, job, "asleep")
    start = shared_operator.data_dir / "jobs" / job["job_id"] / "start.1"
    os.kill(int(json.loads(start.read_bytes())["pid"]), signal.SIGTERM)
    done = shared_operator.finished(endpoint, job)
    assert (done["status"], done["result"]) == ("status_succeeded", 2)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("raise", "status_worker_error"),
        ("killed", "status_worker_error"),
        ("hungry", "status_worker_oom"),
        ("timeout", "status_timed_out"),
    ],
)
def test_a_job_that_ended_by_itself_or_by_a_limit_is_not_retried(
    shared_operator: Operator, end: str, status: str
) -> None:
    endpoint = deploy(shared_operator)
    shared_operator.run(endpoint, config={"end": "raise"})  # the next job starts before its timeout
    timeout = 20 if end == "timeout" else None
    done = shared_operator.run(endpoint, config={"end": end}, timeout=timeout)
    assert done["status"] == status
    assert shared_operator.log_of(endpoint, done).count("started") == 1


FORGETFUL = """
import os, signal, time
def task(config):
    folder = os.path.dirname(os.environ["CORTEX_JOB_DIR"])
    while not os.path.exists(folder + "/go"):
        time.sleep(0.01)
    os.unlink(folder + "/start.1")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(300)
"""


def test_a_lost_job_that_removed_its_start_record_ends(
    shared_operator: Operator,
) -> None:
    # Without a memory limit: the job's control group would show that it ran.
    yaml = YAML.replace("RETRIES", "0").replace(", mem: 96Mi", "")
    endpoint = shared_operator.deployed(yaml, {"task.py": FORGETFUL})
    job = shared_operator.submit(endpoint)
    until(
        lambda: shared_operator.status(endpoint, job).get("worker_counts", {}).get("running"),
        "the status shows that the job runs",
    )
    (shared_operator.data_dir / "jobs" / job["job_id"] / "go").touch()
    done = shared_operator.finished(endpoint, job)
    assert done["status"] == "status_unexpected_error"
    assert done["message"] == "its start record is gone"


def test_the_next_operator_retries_a_job_lost_while_none_ran(
    own_operator: Operator,
) -> None:
    endpoint = deploy(own_operator)
    job = own_operator.submit(endpoint)
    own_operator.await_log(endpoint, job, "asleep")
    log = own_operator.data_dir / "jobs" / job["job_id"] / "log"
    own_operator.kill()
    pid = int(json.loads(log.with_name("start.1").read_bytes())["pid"])
    os.kill(pid, signal.SIGKILL)
    own_operator.start()
    done = own_operator.finished(f"{own_operator.url}/again", job)
    assert (done["status"], done["result"]) == ("status_succeeded", 2)


def test_a_timeout_holds_over_all_attempts(shared_operator: Operator) -> None:
    endpoint = deploy(shared_operator)
    shared_operator.run(endpoint, config={"end": "raise"})  # the next job starts before its timeout
    job = shared_operator.submit(endpoint, timeout=20)
    shared_operator.await_log(endpoint, job, "asleep")
    (shared_operator.data_dir / "jobs" / job["job_id"] / "files" / "attempted").unlink()
    lose(shared_operator, endpoint, job)
    assert shared_operator.finished(endpoint, job)["status"] == "status_timed_out"
