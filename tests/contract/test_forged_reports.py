"""Jobs that forge their own result, exit record or messages of their supervisor.

The operator accepts what can be true. A forged report harms no other job, no list and no operator.
"""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import preloaded_cli
from operator_harness import FINAL, PROBE, TIME, Operator, operator, probe_yaml

END = {
    "v": 1, "ending": "exited", "exit_code": 0, "start_ns": 1, "end_ns": 2, "message": None,
    "result": "a lie", "has_result": True,
}  # fmt: skip
YAML = """
- name: liar
  kind: TaskAPI
  definition: {path: liar.py}
  compute: {cpu: 1m}
"""
LIAR = """
import ctypes, json, os, signal, socket, time


def task(config):
    globals()[config["by"]](config["data"].encode("latin-1"))


def outcome(data):
    for fd in os.listdir("/proc/self/fd"):
        if "memfd:outcome" in os.path.realpath(f"/proc/self/fd/{fd}"):
            os.write(int(fd), data)
            os._exit(0)


def record(data):
    folder = os.path.dirname(os.environ["CORTEX_JOB_SPEC"])
    job = os.environ["CORTEX_JOB_ID"].encode()
    with open(f"{folder}/exit.1", "wb") as file:
        file.write(data.replace(b"OWN", job))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def send_as_supervisor(data):
    supervisor, libc = os.getppid(), ctypes.CDLL(None)
    pidfd = os.pidfd_open(supervisor)
    has_sent = False
    for fd in map(int, os.listdir(f"/proc/{supervisor}/fd")):
        own = libc.syscall(438, pidfd, fd, 0)
        try:
            sock = socket.socket(fileno=own)
        except OSError:
            continue
        for message in data.replace(b"OWN", os.environ["CORTEX_JOB_ID"].encode()).split(b"\\n"):
            has_sent = sock.send(message) > 0
    assert has_sent
    print("sent", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def liar(shared_operator: Operator) -> str:
    return shared_operator.deployed(YAML, {"liar.py": LIAR})


@pytest.fixture
def victim(shared_operator: Operator, probe: str, tmp_path: Path) -> Any:
    """Another job, which runs during the attack and must succeed."""
    go = tmp_path / "go"
    job = shared_operator.submit(probe, config={"do": "say", "go": str(go)})
    shared_operator.await_log(probe, job, "line 0")
    yield job
    assert shared_operator.status(probe, job)["status"] == "status_running"
    go.touch()
    assert shared_operator.finished(probe, job)["status"] == "status_succeeded"


def lie(operator: Operator, endpoint: str, by: str, data: bytes | object) -> Any:
    """Run a job that forges a report; its final status. All lists must still work."""
    text = data.decode("latin-1") if isinstance(data, bytes) else json.dumps(data)
    found = operator.run(endpoint, config={"by": by, "data": text})
    check_lists(operator, endpoint, found["job_id"])
    assert TIME.match(found["start_time"])
    assert found["created_time"] <= found["start_time"] <= found["end_time"] < "2100"
    assert len(found.get("message", "")) <= 2000
    return found


def check_lists(operator: Operator, endpoint: str, job_id: str) -> None:
    name = endpoint.rpartition("/")[2]
    listed = operator.http.get(endpoint)
    assert listed.status_code == 200, listed.text
    assert job_id in [each["job_id"] for each in listed.json()["job_statuses"]]
    for path in ("/-/apis", f"/-/apis/{name}", "/metrics"):
        assert operator.http.get(operator.url + path).status_code == 200


def cortex(operator: Operator, *words: str) -> str:
    environment = {**os.environ, "CORTEX_OPERATOR_ENDPOINT": operator.url}
    done = preloaded_cli.run(*words, env=environment)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def record(**changed: object) -> dict[str, object]:
    return {**END, "job_id": "OWN", "attempt": 1, **changed}


OUTCOMES: dict[str, tuple[bytes, str]] = {
    "NaN": (b'{"has_result": true, "result": NaN}', "not JSON"),
    "an infinite number": (b'{"has_result": true, "result": [1e999]}', "not JSON"),
    "5 MB": (b'{"has_result": true, "result": "' + b"x" * 5_000_000 + b'"}', "over "),
    "2 MB": (b'{"has_result": true, "result": "' + b"x" * 1_100_000 + b'"}', "1100002 bytes"),
    "deep": (b'{"has_result": true, "result": ' + b"[" * 900 + b"]" * 900 + b"}", "nested over"),
    "very deep": (b'{"has_result": true, "result": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "deep"),
    "no JSON": (b"\xff\x00", "is not JSON"),
    "a list": (b"[1]", "is not a JSON object"),
    "other types": (b'{"has_result": "yes", "result": 1}', "has_result"),
    "a message of another type": (b'{"message": {"a": 1}}', "message is a dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_result_that_cannot_be_stored_is_left_out(
    shared_operator: Operator, liar: str, name: str
) -> None:
    data, words = OUTCOMES[name]
    found = lie(shared_operator, liar, "outcome", data)
    assert found["status"] == "status_succeeded"
    assert "result" not in found
    assert found["message"].startswith("the task's return value was not kept: ")
    assert words in found["message"]


def test_a_message_of_a_megabyte_is_shortened(shared_operator: Operator, liar: str) -> None:
    message = {"message": "a\ud800\0" + "b" * 1_100_000, "has_result": True, "result": "\ud800\0"}
    found = lie(shared_operator, liar, "outcome", message)
    assert found["message"].startswith("a\\ud800")
    assert len(found["message"]) == 500
    assert found["result"] == "\ud800\0"
    shown = cortex(shared_operator, "get", "liar", found["job_id"], "-o", "json")
    assert json.loads(shown)["job_status"]["message"] == found["message"]
    cortex(shared_operator, "get", "liar", found["job_id"])


FORGED: dict[str, tuple[bytes | object, str]] = {
    "a text for a number": (record(end_ns="x"), "end_ns is 'x'"),
    "an exit code out of range": (record(exit_code=1 << 20), "exit_code is 1048576"),
    "an end before the start": (record(end_ns=0), "end_ns is 0"),
    "an unknown ending": (record(ending="over"), "ending is 'over'"),
    "a message of another type": (record(message=[1]), "message is a list"),
    "5 MB": (record(result="x" * 5_000_000), "at most 1376256 are allowed"),
    "a message of 7 MB": (record(message="x" * 7_000_000), "at most 1376256 are allowed"),
    "no JSON": (b"{", "is not JSON"),
    "deep": (b"[" * 100_000, "deep"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_an_invalid_forged_exit_record_is_a_lost_attempt_with_a_reason(
    shared_operator: Operator, liar: str, name: str
) -> None:
    data, words = FORGED[name]
    found = lie(shared_operator, liar, "record", data)
    assert found["status"] == "status_unexpected_error"
    assert found["message"].startswith("its exit record is not valid: ")
    assert words in found["message"]


def test_a_valid_forged_exit_record_is_accepted_without_its_invalid_parts(
    shared_operator: Operator, liar: str
) -> None:
    found = lie(
        shared_operator,
        liar,
        "record",
        record(end_ns=4_600_000_000 * 10**9, message="x" * 1_200_000),
    )
    assert found["status"] == "status_succeeded"
    assert found["result"] == "a lie"
    assert len(found["message"]) == 500
    nan = json.dumps(record()).replace('"a lie"', "NaN").encode()
    found = lie(shared_operator, liar, "record", nan)
    assert found["status"] == "status_succeeded"
    assert "result" not in found
    assert "not JSON" in found["message"]


def message(**fields: object) -> dict[str, object]:
    return {"job_id": "OWN", "attempt": 1, "start_ns": 1, **fields}


MESSAGES: dict[str, tuple[bytes | object, str]] = {
    "no JSON": (b"{", "is not JSON"),
    "truncated": (b"x" * 70_000, "is not JSON"),
    "a record with a text for a number": (message(ended=True, record=record(end_ns="x")), "end_ns"),
    "an empty record": (message(ended=True, record={}), "lacks a field"),
    "a list for a number": (message(ended=True, start_ns=[1]), "start_ns"),
    "a repeated start": (b"\n".join([json.dumps(message(recorded=True)).encode()] * 200), "repeats an earlier"),
    "a failed start": (message(error="the disk is full", errno=28), "could not begin, but"),
    "an empty report": (message(), "nothing"),
    "its end, while the job runs": (message(ended=True, record=record()), "but the job runs"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_an_impossible_message_on_the_supervisors_socket_is_a_lost_attempt(
    shared_operator: Operator, liar: str, victim: Any, name: str
) -> None:
    data, words = MESSAGES[name]
    found = lie(shared_operator, liar, "send_as_supervisor", data)
    assert found["status"] == "status_unexpected_error"
    assert found["message"].startswith("a message of its supervisor is not valid: ")
    assert words in found["message"]


@pytest.mark.parametrize(
    "fields",
    [{"ended": True, "record": {**END, "job_id": "VICTIM", "attempt": 1}}, {"error": "no"}],
)
def test_no_job_reports_for_another(
    shared_operator: Operator, liar: str, victim: Any, fields: dict[str, object]
) -> None:
    forged = json.dumps({"job_id": "VICTIM", "attempt": 1, **fields})
    found = lie(
        shared_operator,
        liar,
        "send_as_supervisor",
        forged.replace("VICTIM", victim["job_id"]).encode(),
    )
    assert found["status"] == "status_unexpected_error"
    assert "names a job that the supervisor does not run" in found["message"]


def test_invalid_measures_of_a_task_do_not_break_metrics(
    shared_operator: Operator, liar: str
) -> None:
    measures = [
        ["gauge", "\ud800", [["\udc00", "\udc00"]], [1.0]],
        ["counter", "c", [], [10**400]],
        7,
    ]
    found = lie(shared_operator, liar, "outcome", {"measures": measures})
    assert found["status"] == "status_succeeded"
    assert "udc00" in shared_operator.http.get(f"{shared_operator.url}/metrics").text


STORED = {
    "NaN": ("result", "NaN"),
    "in a list": ("result", '{"a": [1, Infinity]}'),
    "deep": ("result", "[" * 900 + "]" * 900),
    "very deep": ("result", "[" * 100_000 + "]" * 100_000),
    "no JSON": ("result", "{"),
    "large": ("result", json.dumps("x" * 5_000_000)),
    "a text for a time": ("end_ns", "x"),
    "a text for a start": ("start_ns", "x"),
    "a text for a code": ("exit_code", "x"),
    "a fraction": ("start_ns", 1.5),
}


def test_invalid_fields_that_an_earlier_version_stored_are_left_out(tmp_path: Path) -> None:
    with operator(tmp_path) as own:
        endpoint = own.deployed(probe_yaml(), {"probe.py": PROBE})
        jobs = [own.run(endpoint, config={"n": number}) for number in range(len(STORED))]
        own.stop()
        with sqlite3.connect(own.data_dir / "operator.db") as database:
            for job, (column, value) in zip(jobs, STORED.values(), strict=True):
                where = (value, job["job_id"])
                database.execute(f"UPDATE jobs SET {column} = ? WHERE job_id = ?", where)
        database.close()
        own.start()
        endpoint = f"{own.url}/probe"
        for job, (column, _) in zip(jobs, STORED.values(), strict=True):
            shown = own.status(endpoint, job)
            assert shown["status"] == "status_succeeded"
            assert ("result" in shown) == (column != "result")
            assert ("not kept" in shown.get("message", "")) == (column == "result")
            assert ("exit_code" in shown) == (column != "exit_code")
            assert TIME.match(shown["end_time"])
            cortex(own, "get", "probe", job["job_id"])
        check_lists(own, endpoint, jobs[-1]["job_id"])
        listed = json.loads(cortex(own, "get", "-o", "json"))
        assert {each["status"] for each in listed[0]["task_job_statuses"]} <= FINAL
        cortex(own, "get", "probe")
