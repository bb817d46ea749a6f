"""Nothing is lost when the operator dies: real `kill -9`, real restarts."""

from __future__ import annotations

import os
import subprocess

from support import CORTEX, PROBE, Operator, probe_yaml, processes_with, until

ONE_CORE = probe_yaml().replace("1m", '"1"')


def test_a_running_job_outlives_the_operator(own: Operator) -> None:
    endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own.url)
    short = own.submit(endpoint, config={"do": "sleep", "s": 1})
    long = own.submit(endpoint, config={"do": "sleep", "s": 300})
    own.await_log(endpoint, short, "asleep")
    own.await_log(endpoint, long, "asleep")
    (worker,) = processes_with(f"CORTEX_JOB_ID={long['job_id']}")
    own.kill()
    until(lambda: not processes_with(f"CORTEX_JOB_ID={short['job_id']}"), "the short one done")
    own.start()
    endpoint = own.url + path
    assert own.finished(endpoint, short)["result"] == "rested"
    assert own.status(endpoint, long)["worker_counts"] == {"pending": 0, "running": 1}
    assert processes_with(f"CORTEX_JOB_ID={long['job_id']}") == [worker]
    assert own.delete(endpoint, long).status_code == 200
    until(lambda: not processes_with(long["job_id"]), "the long one gone")


def test_waiting_jobs_start_after_a_crash_each_once(own: Operator) -> None:
    own.data_dir.joinpath("once").mkdir()
    code = (
        "import os\n\n\ndef task(config):\n"
        "    mark = os.environ['CORTEX_JOB_ID'] + '\\n'\n"
        f"    with open('{own.data_dir}/once/marks', 'a') as file:\n        file.write(mark)\n"
    )
    endpoint = own.deployed(ONE_CORE, {"probe.py": code})
    path = endpoint.removeprefix(own.url)
    jobs = [own.submit(endpoint) for _ in range(30)]
    own.kill()
    own.start()
    endpoint = own.url + path
    for job in jobs:
        assert own.finished(endpoint, job)["status"] == "status_succeeded"
    marks = (own.data_dir / "once" / "marks").read_text().split()
    assert sorted(marks) == sorted(job["job_id"] for job in jobs)


def test_a_stop_is_final_across_a_crash(own: Operator) -> None:
    endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own.url)
    job = own.submit(endpoint, config={"do": "stubborn"})
    own.await_log(endpoint, job, "asleep")
    assert own.delete(endpoint, job).status_code == 200
    own.kill()
    own.start()
    endpoint = own.url + path
    assert own.status(endpoint, job)["status"] == "status_stopped"
    until(lambda: not processes_with(job["job_id"]), "its processes gone")
    assert own.status(endpoint, job)["status"] == "status_stopped"


def test_a_timeout_holds_while_the_operator_is_away(own: Operator) -> None:
    endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own.url)
    job = own.submit(endpoint, config={"do": "sleep", "s": 300}, timeout=2)
    own.await_log(endpoint, job, "asleep")
    own.kill()
    until(lambda: not processes_with(f"CORTEX_JOB_ID={job['job_id']}"), "its processes gone")
    own.start()
    assert own.finished(own.url + path, job)["status"] == "status_timed_out"


def test_a_clean_end_leaves_jobs_running(own: Operator) -> None:
    endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own.url)
    job = own.submit(endpoint, config={"do": "sleep", "s": 300})
    own.await_log(endpoint, job, "asleep")
    assert own.stop() == 0
    assert processes_with(f"CORTEX_JOB_ID={job['job_id']}")
    own.start()
    assert own.status(own.url + path, job)["status"] == "status_running"
    assert own.delete(own.url + path, job).status_code == 200


def test_a_repeated_key_holds_across_a_crash(own: Operator) -> None:
    endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own.url)
    key = {"Idempotency-Key": "k"}
    first = own.http.post(endpoint, json={}, headers=key).json()
    own.kill()
    own.start()
    assert own.http.post(own.url + path, json={}, headers=key).json() == first


def test_two_operators_on_one_folder(own: Operator) -> None:
    second = subprocess.run(
        [CORTEX, "serve", "--port", "0", "--data-dir", str(own.data_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "CORTEX_CLI_CONFIG_DIR": str(own.data_dir.parent)},
    )
    assert second.returncode == 1
    assert f"pid {own.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert second.stdout == ""
