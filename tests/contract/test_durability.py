"""Nothing is lost when the operator dies: real `kill -9`, real restarts."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx
import pytest

from support import PROBE, Operator, operator, probe_yaml, processes_with, refused, until

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
    # That it has started may not have been stored when the operator was killed.
    until(
        lambda: own.status(endpoint, long)["worker_counts"] == {"pending": 0, "running": 1},
        "the long one is seen to run",
    )
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
    own.run(endpoint)  # so that the next one begins long before its timeout, wherever it runs
    job = own.submit(endpoint, config={"do": "sleep", "s": 300}, timeout=10)
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


@pytest.mark.parametrize(
    ("method", "query", "kind"),
    [
        ("GET", "?wait=60", "operator.no_driver"),
        ("GET", "?wait=6e1", "operator.no_driver"),  # the framework's way
        ("POST", "", "operator.outcome_unknown"),  # of which the body is still to come
    ],
)
def test_whoever_waits_while_the_operator_ends_is_told(
    own: Operator, method: str, query: str, kind: str
) -> None:
    endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own.url)
    job = own.submit(endpoint, config={"do": "sleep", "s": 300})
    at = path if method == "POST" else f"{path}/{job['job_id']}{query}"
    length = "content-length: 2\r\n" if method == "POST" else ""
    address = own.http.get(own.url + "/healthz").request.url
    with (
        socket.create_connection((address.host, address.port), 60) as waits,
        httpx.Client(timeout=60) as http,
    ):
        waits.sendall(f"{method} {at} HTTP/1.1\r\nhost: localhost\r\n{length}\r\n".encode())
        events = {"Accept": "text/event-stream"}
        with http.stream("GET", f"{endpoint}/{job['job_id']}/logs", headers=events) as followed:
            lines = followed.iter_lines()
            until(lambda: "asleep" in next(lines), "the log is followed")
            assert own.stop() == 0
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        answer = b"".join(iter(lambda: waits.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(content)["kind"] == kind
    assert "Traceback" not in own.log.read_text()


def test_a_repeated_key_holds_across_a_crash(own: Operator) -> None:
    endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
    path = endpoint.removeprefix(own.url)
    key = {"Idempotency-Key": "k"}
    first = own.http.post(endpoint, json={}, headers=key).json()
    own.kill()
    own.start()
    assert own.http.post(own.url + path, json={}, headers=key).json() == first


def test_two_operators_on_one_folder(own: Operator) -> None:
    assert f"pid {own.process.pid}" in refused(own.data_dir)


def test_a_host_that_others_reach_needs_a_word(tmp_path: Path) -> None:
    assert "--insecure" in refused(tmp_path / "data", "--host", "0.0.0.0")
    with operator(tmp_path, "--host", "0.0.0.0", "--insecure") as running:
        assert running.http.get(f"{running.url}/healthz").status_code == 200


def test_an_address_that_cannot_be_had(own: Operator, tmp_path: Path) -> None:
    port = own.url.rpartition(":")[2]
    assert "--port" in refused(tmp_path / "other", "--port", port)
    assert "--host" in refused(tmp_path / "other", "--host", "no.such.host.invalid")


def test_a_data_folder_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--data-dir" in refused(tmp_path / "file" / "data")


def test_a_damaged_database(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "operator.db").write_bytes(b"no database" * 1000)
    assert "cannot be used" in refused(tmp_path / "data")
