"""A short storm on a whole cluster, and what the storm counts as a violation."""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos.cluster_storm import Job, Storm, storm
from chaos.storm import Violation
from cluster.machines import Machines
from cortex.spec.times import now_ns, rfc3339

pytestmark = pytest.mark.cluster


@pytest.fixture
def run(tmp_path: Path) -> Storm:
    """A storm without machines."""
    return Storm(cast(Machines, SimpleNamespace(shared=tmp_path)), seed=1)


def ended(run: Storm, status: str, *marks: str, api: str = "storm") -> Job:
    """A job that has just ended, after starts of these attempts on these machines."""
    now = rfc3339(now_ns())
    job = Job("quick", {"job_id": f"j{len(run.jobs)}", "api_name": api, "timeout": None})
    job.final = {"status": status, "created_time": now, "start_time": now, "end_time": now}
    run.jobs.append(job)
    with run.marks_file.open("a") as file:
        file.writelines(f"{job.id} {mark}\n" for mark in marks)
    return job


def allowed(run: Storm, job: Job) -> set[str]:
    return run.allowed(job, cast(dict[str, Any], job.final))


def test_a_job_may_fail_only_where_its_node_was_lost(run: Storm) -> None:
    job = ended(run, "status_unexpected_error", "1 n1")
    assert allowed(run, job) == {"status_succeeded"}
    run.losses.append((time.time() - 1, "n2"))
    assert allowed(run, job) == {"status_succeeded"}
    run.losses.append((time.time() + 60, "n1"))  # after its end
    assert allowed(run, job) == {"status_succeeded"}
    run.losses.append((time.time() - 1, "n1"))
    assert allowed(run, job) == {"status_succeeded", "status_unexpected_error"}


def test_a_loss_before_the_start_uses_up_a_retry(run: Storm) -> None:
    job = ended(run, "status_unexpected_error", "1 n1", api="again")
    now = time.time()
    run.losses += [(now - 9, "n1"), (now - 9, "n2"), (now - 6, "n1")]
    assert allowed(run, job) == {"status_succeeded"}
    run.losses.append((now - 3, "n1"))
    assert allowed(run, job) == {"status_succeeded", "status_unexpected_error"}


def test_a_stopped_job_may_have_no_other_status(run: Storm) -> None:
    job = ended(run, "status_stopped", "1 n1")
    job.stopped = True
    run.losses.append((time.time() - 1, "n1"))
    assert allowed(run, job) == {"status_stopped"}


@pytest.mark.parametrize(
    ("marks", "api", "message"),
    [
        (["1 n1", "1 n2"], "again", "ran twice"),
        (["1 n1", "2 n2"], "storm", "started 2 times"),
        (["1 n2", "2 n1"], "again", "n2 was not lost"),
        ([], "storm", "never started"),
    ],
)
def test_a_start_too_many_or_too_few_is_a_violation(
    run: Storm, marks: list[str], api: str, message: str
) -> None:
    run.losses.append((time.time() - 1, "n1"))
    ended(run, "status_succeeded", "1 n1")
    ended(run, "status_succeeded", "1 n1", "2 n2", api="again")
    run.check_marks()
    ended(run, "status_succeeded", *marks, api=api)
    with pytest.raises(Violation, match=message):
        run.check_marks()


def test_nothing_is_lost_whatever_fails() -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")  # pytest shows it when the test fails
    made = storm(jobs=30, faults=16, seed=seed)
    assert sum(made.faults.values()) + sum(made.skipped.values()) == 16
