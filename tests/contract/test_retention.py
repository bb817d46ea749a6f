"""The removal of finished jobs, logs and old versions, on a real operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from operator_harness import PROBE, Operator, operator, probe_yaml, until

ONE_SECOND = str(1 / 86_400)  # in days
SLEEP = {"do": "sleep", "s": 300}


@contextmanager
def operator_with_probe(folder: Path, *options: str) -> Iterator[tuple[Operator, str]]:
    with operator(folder, *options) as running:
        yield running, running.deployed(probe_yaml(), {"probe.py": PROBE})


def is_removed(running: Operator, endpoint: str, job: Any) -> bool:
    return running.http.get(f"{endpoint}/{job['job_id']}").status_code == 404


def folders(running: Operator, kind: str) -> set[str]:
    found = (running.data_dir / kind).iterdir()
    return {path.name for path in found if not path.name.startswith(".")}


def test_old_logs_are_removed_and_their_jobs_stay(tmp_path: Path) -> None:
    with operator_with_probe(tmp_path, "--keep-logs", ONE_SECOND) as (running, endpoint):
        asleep = running.submit(endpoint, config=SLEEP)
        job = running.submit(endpoint, config={"do": "say"})
        done = running.finished(endpoint, job)
        url = f"{endpoint}/{job['job_id']}/logs"
        until(lambda: running.http.get(url).status_code == 404, "the log is removed")
        assert "--keep-logs" in running.http.get(url).json()["message"]
        assert folders(running, "jobs") == {asleep["job_id"]}
        assert running.status(endpoint, job) == done
        running.await_log(endpoint, asleep, "asleep")


def test_old_jobs_are_removed_but_no_running_ones(tmp_path: Path) -> None:
    with operator_with_probe(tmp_path, "--keep-jobs", ONE_SECOND) as (running, endpoint):
        key = {"Idempotency-Key": "k"}
        asleep = running.submit(endpoint, config=SLEEP)
        job = running.http.post(endpoint, json={}, headers=key).json()
        stopped = running.submit(endpoint, config=SLEEP)
        running.delete(endpoint, stopped)
        for old in (job, stopped):
            until(lambda old=old: is_removed(running, endpoint, old), "the job is removed")
        assert folders(running, "jobs") == {asleep["job_id"]}
        listed = running.http.get(endpoint).json()["job_statuses"]
        assert [each["job_id"] for each in listed] == [asleep["job_id"]]
        again = running.http.post(endpoint, json={}, headers=key).json()
        assert again["job_id"] != job["job_id"]


def test_of_many_jobs_the_newest_are_kept(tmp_path: Path) -> None:
    with operator_with_probe(tmp_path, "--keep-count", "3") as (running, endpoint):
        other = running.deployed(probe_yaml("other"), {"probe.py": PROBE})
        asleep = running.submit(endpoint, config=SLEEP)
        alone = running.submit(other)
        many = [running.submit(endpoint) for _ in range(8)]
        for job in many:
            running.http.get(f"{endpoint}/{job['job_id']}", params={"wait": 60})
        running.kill()
        running.start()  # retention runs at the start, and then once a minute
        now = f"{running.url}/probe"
        until(
            lambda: all(is_removed(running, now, job) for job in many[:5]), "five jobs are removed"
        )
        for job in many[5:]:
            assert running.finished(now, job)["status"] == "status_succeeded"
        assert running.status(now, asleep)["status"] == "status_running"
        assert running.finished(f"{running.url}/other", alone)["status"] == "status_succeeded"


def test_unused_versions_projects_and_environments_are_removed(tmp_path: Path) -> None:
    with operator_with_probe(tmp_path, "--keep-jobs", ONE_SECOND) as (running, endpoint):

        def deploy(number: int) -> str:
            response = running.deploy(probe_yaml(), {"probe.py": PROBE, "n": str(number)})
            return str(response.json()[0]["api"]["spec"]["project_id"])

        used_by_a_job = deploy(1)
        asleep = running.submit(endpoint, config=SLEEP)
        running.await_log(endpoint, asleep, "asleep")
        unused = deploy(2)
        current = deploy(3)
        until(
            lambda: folders(running, "projects") == {used_by_a_job, current}, "two projects remain"
        )
        api = running.http.get(f"{running.url}/-/apis/probe").json()[0]
        assert len(api["api_versions"]) == 2
        assert running.status(endpoint, asleep)["status"] == "status_running"
        # A removed version can be deployed again.
        assert deploy(2) == unused
        assert running.http.post(endpoint, json={}).status_code == 200
        running.delete(endpoint, asleep)
        until(lambda: folders(running, "projects") == {unused}, "one project remains")


def test_a_deleted_api_leaves_no_folders_after_its_time(tmp_path: Path) -> None:
    with operator_with_probe(tmp_path, "--keep-jobs", ONE_SECOND) as (running, endpoint):
        running.submit(endpoint)
        until(lambda: folders(running, "environments"), "its environment is built")
        assert running.http.delete(f"{running.url}/-/apis/probe").status_code == 200
        for kind in ("jobs", "projects", "environments"):
            until(lambda kind=kind: not folders(running, kind), f"all {kind} are removed")


def test_nothing_is_removed_before_its_time(tmp_path: Path) -> None:
    with operator_with_probe(tmp_path, "--keep-jobs", "0", "--keep-logs", "1") as (
        running,
        endpoint,
    ):
        job = running.submit(endpoint, config={"do": "say"})
        done = running.finished(endpoint, job)
        running.kill()
        running.start()
        until(lambda: running.http.get(f"{running.url}/readyz").status_code == 200, "ready")
        assert running.status(f"{running.url}/probe", job) == done
        assert running.log_of(f"{running.url}/probe", job) == "line 0\n"
