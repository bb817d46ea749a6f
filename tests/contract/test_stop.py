"""Stops: DELETE of a job."""

from __future__ import annotations

from operator_harness import PROBE, Operator, probe_yaml, processes_with, until


def test_a_repeated_stop_gets_the_same_answer(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    for _ in range(2):
        response = shared_operator.delete(probe, job)
        assert response.status_code == 200
        assert response.json() == {"message": f"stopped job {job['job_id']}"}


def test_stop_by_query(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    response = shared_operator.http.delete(probe, params={"jobID": job["job_id"]})
    assert response.json() == {"message": f"stopped job {job['job_id']}"}
    assert shared_operator.status(probe, job)["status"] == "status_stopped"


def test_a_finished_job_cannot_be_stopped(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe)
    before = shared_operator.finished(probe, job)
    response = shared_operator.delete(probe, job)
    assert (response.status_code, response.json()["kind"]) == (409, "conflict")
    assert shared_operator.status(probe, job) == before


def test_a_task_may_save_its_work_first(long_grace_operator: Operator) -> None:
    endpoint = long_grace_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = long_grace_operator.submit(endpoint, config={"do": "save_on_term"})
    long_grace_operator.await_log(endpoint, job, "asleep")
    long_grace_operator.delete(endpoint, job)
    long_grace_operator.await_log(endpoint, job, "saved")
    (saved,) = (long_grace_operator.data_dir / "jobs" / job["job_id"]).rglob("saved")
    assert saved.read_text() == "checkpoint"
    assert long_grace_operator.status(endpoint, job)["status"] == "status_stopped"


def test_a_task_that_ignores_sigterm_is_killed(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "stubborn"})
    shared_operator.await_log(probe, job, "asleep")
    shared_operator.delete(probe, job)
    assert shared_operator.status(probe, job)["status"] == "status_stopped"
    until(lambda: not processes_with(job["job_id"]), "its processes have exited")


def test_daemonised_forking_grandchildren_are_killed(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(
        probe, config={"do": "breed", "s": 300, "mark": "forked-and-stopped"}
    )
    shared_operator.await_log(probe, job, "asleep")
    until(
        lambda: len(processes_with("MARK=forked-and-stopped")) > 10,
        "more than 10 grandchildren run",
    )
    shared_operator.delete(probe, job)
    until(lambda: not processes_with("MARK=forked-and-stopped"), "all grandchildren have exited")


def test_processes_that_outlive_their_task_are_killed(
    shared_operator: Operator, probe: str
) -> None:
    job = shared_operator.submit(probe, config={"do": "breed", "s": 0, "mark": "forked-and-left"})
    assert shared_operator.finished(probe, job)["status"] == "status_succeeded"
    until(lambda: not processes_with("MARK=forked-and-left"), "all grandchildren have exited")


def test_stop_without_a_job_says_what_to_do(shared_operator: Operator, probe: str) -> None:
    response = shared_operator.http.delete(probe)
    assert response.status_code == 400
    assert "job_id" in response.json()["message"]
