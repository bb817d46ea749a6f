"""CONTRACT.md, Stop: DELETE E/<job_id>."""

from __future__ import annotations

from operator_harness import PROBE, Operator, probe_yaml, processes_with, until


def test_stop_says_so_and_again(shared_operator: Operator, probe: str) -> None:
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


def test_a_task_may_save_its_work_first(patient_operator: Operator) -> None:
    endpoint = patient_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = patient_operator.submit(endpoint, config={"do": "save_on_term"})
    patient_operator.await_log(endpoint, job, "asleep")
    patient_operator.delete(endpoint, job)
    patient_operator.await_log(endpoint, job, "saved")
    (saved,) = (patient_operator.data_dir / "jobs" / job["job_id"]).rglob("saved")
    assert saved.read_text() == "checkpoint"
    assert patient_operator.status(endpoint, job)["status"] == "status_stopped"


def test_a_task_that_ignores_sigterm_is_killed(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "stubborn"})
    shared_operator.await_log(probe, job, "asleep")
    shared_operator.delete(probe, job)
    assert shared_operator.status(probe, job)["status"] == "status_stopped"
    until(lambda: not processes_with(job["job_id"]), "its processes gone")


def test_daemonised_forking_grandchildren_are_gone(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(
        probe, config={"do": "breed", "s": 300, "mark": "forked-and-stopped"}
    )
    shared_operator.await_log(probe, job, "asleep")
    until(lambda: len(processes_with("MARK=forked-and-stopped")) > 10, "a crowd")
    shared_operator.delete(probe, job)
    until(lambda: not processes_with("MARK=forked-and-stopped"), "the crowd gone")


def test_what_a_finished_task_leaves_running_is_gone(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "breed", "s": 0, "mark": "forked-and-left"})
    assert shared_operator.finished(probe, job)["status"] == "status_succeeded"
    until(lambda: not processes_with("MARK=forked-and-left"), "the crowd gone")


def test_stop_without_a_job_says_what_to_do(shared_operator: Operator, probe: str) -> None:
    response = shared_operator.http.delete(probe)
    assert response.status_code == 400
    assert "job_id" in response.json()["message"]
