"""No data is lost when the operator dies. The tests use SIGKILL and real restarts."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx
import pytest

from operator_harness import (
    PROBE,
    Operator,
    operator,
    probe_yaml,
    processes_with,
    startup_error,
    until,
)

ONE_CORE = probe_yaml().replace("1m", '"1"')


def test_a_running_job_outlives_the_operator(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own_operator.url)
    short = own_operator.submit(endpoint, config={"do": "sleep", "s": 1})
    long = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, short, "asleep")
    own_operator.await_log(endpoint, long, "asleep")
    (worker,) = processes_with(f"CORTEX_JOB_ID={long['job_id']}")
    own_operator.kill()
    until(
        lambda: not processes_with(f"CORTEX_JOB_ID={short['job_id']}"), "the short job has exited"
    )
    own_operator.start()
    endpoint = own_operator.url + path
    assert own_operator.finished(endpoint, short)["result"] == "rested"
    # The operator may have been killed before it stored the start.
    until(
        lambda: (
            own_operator.status(endpoint, long)["worker_counts"] == {"pending": 0, "running": 1}
        ),
        "the status shows that the long job runs",
    )
    assert processes_with(f"CORTEX_JOB_ID={long['job_id']}") == [worker]
    assert own_operator.delete(endpoint, long).status_code == 200
    until(lambda: not processes_with(long["job_id"]), "the long job has exited")


def test_waiting_jobs_start_after_a_crash_each_once(own_operator: Operator) -> None:
    own_operator.data_dir.joinpath("once").mkdir()
    code = (
        "import os\n\n\ndef task(config):\n"
        "    mark = os.environ['CORTEX_JOB_ID'] + '\\n'\n"
        f"    with open('{own_operator.data_dir}/once/marks', 'a') as file:\n        file.write(mark)\n"
    )
    endpoint = own_operator.deployed(ONE_CORE, {"probe.py": code})
    path = endpoint.removeprefix(own_operator.url)
    jobs = [own_operator.submit(endpoint) for _ in range(30)]
    own_operator.kill()
    own_operator.start()
    endpoint = own_operator.url + path
    for job in jobs:
        assert own_operator.finished(endpoint, job)["status"] == "status_succeeded"
    marks = (own_operator.data_dir / "once" / "marks").read_text().split()
    assert sorted(marks) == sorted(job["job_id"] for job in jobs)


def test_a_stop_is_final_across_a_crash(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own_operator.url)
    job = own_operator.submit(endpoint, config={"do": "stubborn"})
    own_operator.await_log(endpoint, job, "asleep")
    assert own_operator.delete(endpoint, job).status_code == 200
    own_operator.kill()
    own_operator.start()
    endpoint = own_operator.url + path
    assert own_operator.status(endpoint, job)["status"] == "status_stopped"
    until(lambda: not processes_with(job["job_id"]), "its processes have exited")
    assert own_operator.status(endpoint, job)["status"] == "status_stopped"


def test_a_timeout_holds_while_no_operator_runs(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own_operator.url)
    own_operator.run(endpoint)  # the next job starts well before its timeout
    job = own_operator.submit(endpoint, config={"do": "sleep", "s": 300}, timeout=10)
    own_operator.await_log(endpoint, job, "asleep")
    own_operator.kill()
    until(lambda: not processes_with(f"CORTEX_JOB_ID={job['job_id']}"), "its processes have exited")
    own_operator.start()
    assert own_operator.finished(own_operator.url + path, job)["status"] == "status_timed_out"


def test_a_clean_shutdown_leaves_jobs_running(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own_operator.url)
    job = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, job, "asleep")
    assert own_operator.stop() == 0
    assert processes_with(f"CORTEX_JOB_ID={job['job_id']}")
    own_operator.start()
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"
    assert own_operator.delete(own_operator.url + path, job).status_code == 200


@pytest.mark.parametrize(
    ("method", "query", "kind"),
    [
        ("GET", "?wait=60", "operator.no_driver"),
        ("GET", "?wait=6e1", "operator.no_driver"),  # the framework handles this form
        ("POST", "", "operator.outcome_unknown"),  # the client has not sent the body yet
    ],
)
def test_waiting_clients_get_an_answer_when_the_operator_shuts_down(
    own_operator: Operator, method: str, query: str, kind: str
) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own_operator.url)
    job = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    at = path if method == "POST" else f"{path}/{job['job_id']}{query}"
    length = "content-length: 2\r\n" if method == "POST" else ""
    address = own_operator.http.get(own_operator.url + "/healthz").request.url
    with (
        socket.create_connection((address.host, address.port), 60) as waiting,
        httpx.Client(timeout=60) as http,
    ):
        waiting.sendall(f"{method} {at} HTTP/1.1\r\nhost: localhost\r\n{length}\r\n".encode())
        events = {"Accept": "text/event-stream"}
        with http.stream("GET", f"{endpoint}/{job['job_id']}/logs", headers=events) as followed:
            lines = followed.iter_lines()
            until(lambda: "asleep" in next(lines), "the log is followed")
            assert own_operator.stop() == 0
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        answer = b"".join(iter(lambda: waiting.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(content)["kind"] == kind
    assert "Traceback" not in own_operator.log.read_text()


def test_a_repeated_key_holds_across_a_crash(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own_operator.url)
    key = {"Idempotency-Key": "k"}
    first = own_operator.http.post(endpoint, json={}, headers=key).json()
    own_operator.kill()
    own_operator.start()
    assert own_operator.http.post(own_operator.url + path, json={}, headers=key).json() == first


def test_a_second_operator_on_one_folder_is_refused(own_operator: Operator) -> None:
    assert f"pid {own_operator.process.pid}" in startup_error(own_operator.data_dir)


def test_a_host_beyond_localhost_needs_the_flag_insecure(tmp_path: Path) -> None:
    assert "--insecure" in startup_error(tmp_path / "data", "--host", "0.0.0.0")
    with operator(tmp_path, "--host", "0.0.0.0", "--insecure") as running:
        assert running.http.get(f"{running.url}/healthz").status_code == 200


def test_an_unusable_address_is_refused_with_its_flag(
    own_operator: Operator, tmp_path: Path
) -> None:
    port = own_operator.url.rpartition(":")[2]
    assert "--port" in startup_error(tmp_path / "other", "--port", port)
    assert "--host" in startup_error(tmp_path / "other", "--host", "no.such.host.invalid")


def test_an_unusable_data_folder_is_refused_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--data-dir" in startup_error(tmp_path / "file" / "data")


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "operator.db").write_bytes(b"no database" * 1000)
    assert "cannot be used" in startup_error(tmp_path / "data")
