"""Large configs and results of one client delay no other client.

The config of a waiting job stays in the store, lists leave out long values, another process reads
large bodies, and the configs of all waiting jobs are bounded in bytes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from operator_harness import PROBE, Operator, operator, probe_yaml, until

MIB = 1024**2
SLEEP = {"do": "sleep", "s": 300}
ROWS = json.dumps(
    {"config": {"rows": [{"id": n, "name": f"row {n}"} for n in range(200_000)]}}
).encode()
TEXT = json.dumps({"config": {"text": "é" * 1_200_000}}).encode()
# Runs in a process of its own: the test's process is busy with the bodies.
PING = """
import http.client, sys, time


def waited():
    # Seconds that this process and the operator's first thread waited for a core.
    stats = [open(f"/proc/{pid}/schedstat").read().split() for pid in ("self", sys.argv[2])]
    return sum(int(stat[1]) for stat in stats) / 1e9


connection = http.client.HTTPConnection(sys.argv[1])
while True:
    begin = time.monotonic() - waited()
    connection.request("GET", "/healthz")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    print(time.monotonic() - waited() - begin, flush=True)
    time.sleep(0.01)
"""


@contextmanager
def pinging(running: Operator) -> Iterator[list[float]]:
    """The times of the operator's answers to `/healthz` during the block; at least one.

    They exclude the time that other processes of the machine have used the cores.
    """
    where = [running.url.removeprefix("http://"), str(running.process.pid)]
    command = [sys.executable, "-c", PING, *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        took = [float(process.stdout.readline())]
        try:
            yield took
        finally:
            process.kill()
            took += map(float, process.stdout.read().splitlines())


def peak_bytes(running: Operator) -> int:
    """The peak memory of the operator's process."""
    for line in Path(f"/proc/{running.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def full_api(own_operator: Operator) -> tuple[str, Any]:
    """An endpoint whose jobs wait, and the running job for which they wait."""
    yaml = probe_yaml(more="  limits: {max_running: 1}\n")
    endpoint = own_operator.deployed(yaml, {"probe.py": PROBE})
    first = own_operator.submit(endpoint, config=SLEEP)
    until(
        lambda: own_operator.status(endpoint, first)["worker_counts"]["running"],
        "the first job runs",
    )
    return endpoint, first


def post(own_operator: Operator, endpoint: str, body: bytes, **headers: str) -> httpx.Response:
    response = own_operator.http.post(endpoint, content=body, headers=headers)
    assert response.status_code == 200, response.text[:1000]
    return response


def test_large_waiting_configs_delay_no_other_client(own_operator: Operator) -> None:
    endpoint, first = full_api(own_operator)
    before = peak_bytes(own_operator)
    with pinging(own_operator) as took:
        jobs = [post(own_operator, endpoint, ROWS).json() for _ in range(4)]
        for _ in range(5):
            page = own_operator.http.get(endpoint, params={"limit": 1000})
            apis = own_operator.http.get(f"{own_operator.url}/-/apis")
            assert len(page.content) + len(apis.content) < 100_000
        one = own_operator.http.get(f"{endpoint}/{jobs[0]['job_id']}")
        assert one.json()["job_status"]["config"] == json.loads(ROWS)["config"]
    assert max(took) < 1.0  # 0.1 s on an idle machine
    # All configs: 30 MB as text, 200 MB as objects.
    assert peak_bytes(own_operator) - before < 80 * MIB
    own_operator.kill()
    own_operator.start()
    endpoint = f"{own_operator.url}/probe"
    assert peak_bytes(own_operator) - before < 80 * MIB
    for job in jobs[1:]:
        own_operator.delete(endpoint, job)
    own_operator.delete(endpoint, first)
    end = own_operator.finished(endpoint, jobs[0])
    # The task returns its config, which is too long for a result.
    assert (end["status"], "result" in end) == ("status_succeeded", False)


def test_a_job_gets_its_large_config_with_and_without_waiting(own_operator: Operator) -> None:
    own_operator.deployed(
        "- name: size\n  kind: TaskAPI\n  definition:\n    path: size.py\n    config: {below: {a: 1}}\n"
        "  compute: {cpu: 1}\n",
        {"size.py": "def task(config):\n    return [len(config['text']), config['below']]\n"},
    )
    endpoint, first = full_api(own_operator)
    config = {"text": "é" * 300_000, "below": {"b": 2}}
    waits = own_operator.submit(f"{own_operator.url}/size", config=config)
    own_operator.delete(endpoint, first)
    expected = [300_000, {"a": 1, "b": 2}]
    assert own_operator.finished(f"{own_operator.url}/size", waits)["result"] == expected
    end = own_operator.run(f"{own_operator.url}/size", config=config)
    assert (end["result"], end["config"]) == (expected, config)


def test_lists_leave_out_long_values_and_name_them(shared_operator: Operator, probe: str) -> None:
    small = shared_operator.run(probe, config={"text": "x" * 1000})
    large = shared_operator.run(probe, config={"text": "x" * 3000})
    assert large["config"] == {"text": "x" * 3000}
    assert large["result"]["text"] == "x" * 3000
    assert "truncated" not in large
    api = shared_operator.http.get(f"{shared_operator.url}/-/apis/probe").json()[0]
    page = shared_operator.http.get(probe, params={"limit": 50}).json()
    for listed in (page["job_statuses"], api["task_job_statuses"]):
        by_id = {status["job_id"]: status for status in listed}
        assert by_id[small["job_id"]] == small
        left_out = {"config": None, "result": None, "truncated": ["config", "result"]}
        assert by_id[large["job_id"]] == {**large, **left_out}


def test_the_end_event_of_a_followed_log_has_long_values(
    shared_operator: Operator, probe: str
) -> None:
    end = shared_operator.run(probe, config={"text": "x" * 3000})
    events = shared_operator.http.get(
        f"{probe}/{end['job_id']}/logs", headers={"Accept": "text/event-stream"}
    )
    last = events.text.strip().splitlines()[-1].removeprefix("data: ")
    assert json.loads(last) == end


def test_a_page_is_bounded_in_bytes_and_the_next_continues(own_operator: Operator) -> None:
    endpoint, _ = full_api(own_operator)
    config = {"text": "x" * 2000}
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: own_operator.submit(endpoint, config=config), range(500)))
    found: list[str] = []
    cursor, pages = None, 0
    while cursor is not None or not pages:
        query = {"limit": 1000} | ({} if cursor is None else {"cursor": cursor})
        response = own_operator.http.get(endpoint, params=query)
        assert len(response.content) < 1.1 * MIB
        found += [status["job_id"] for status in response.json()["job_statuses"]]
        cursor, pages = response.json()["next_cursor"], pages + 1
    assert pages == 2
    assert len(found) == len(set(found)) == 501
    assert {job["job_id"] for job in jobs} < set(found)
    (api,) = own_operator.http.get(f"{own_operator.url}/-/apis").json()
    assert api["truncated"] == ["task_job_statuses"]
    assert len(api["task_job_statuses"]) < 500


def test_waiting_configs_are_bounded_in_bytes_across_a_crash(tmp_path: Path) -> None:
    with operator(tmp_path, "--cpu", "1", "--max-waiting-bytes", "100Ki") as own_operator:
        endpoint, first = full_api(own_operator)
        config = {"text": "x" * 40_000}
        two = [own_operator.submit(endpoint, config=config) for _ in range(2)]
        for body in ({"config": config}, {"config": {"text": "x" * 200_000}}):
            for key in ({}, {"Idempotency-Key": "a"}):
                refused = own_operator.http.post(endpoint, json=body, headers=key)
                assert refused.status_code == 429, refused.text
                assert refused.json()["kind"] == "limit.max_waiting_bytes"
                assert "--max-waiting-bytes" in refused.json()["message"]
                assert int(refused.headers["retry-after"]) > 0
        own_operator.submit(endpoint, config={"text": "x" * 10_000})
        own_operator.kill()
        own_operator.start()
        endpoint = f"{own_operator.url}/probe"
        assert own_operator.http.post(endpoint, json={"config": config}).status_code == 429
        own_operator.delete(endpoint, two[0])
        # The operator counts the bytes anew after a moment.
        until(
            lambda: own_operator.http.post(endpoint, json={"config": config}).status_code == 200,
            "the submit fits",
        )
        (third,) = own_operator.http.get(endpoint, params={"limit": 1}).json()["job_statuses"]
        assert own_operator.http.post(endpoint, json={"config": config}).status_code == 429
        own_operator.delete(endpoint, first)
        for job in (two[1], third):
            assert own_operator.finished(endpoint, job)["result"]["text"] == config["text"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'{"timeout": -1}',
        b'{"config": NaN}',
        b'{"config": {"a": 1e999}}',
        b'{"config": {"a": "\xff"}}',
        b'{"nothing": 1}',
        b'{"config": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}",
        b'{"config": ' + b'{"a":' * 20_000,
        b"a=b&c=d",
        b'{"timeout": 60, "config": {"a": "\xc3\xa9\\ud800"}}',
    ],
)
def test_a_large_body_gets_the_answer_of_a_small_one(
    shared_operator: Operator, probe: str, body: bytes
) -> None:
    def answer(body: bytes) -> tuple[int, object]:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        response = shared_operator.http.post(probe, content=body, headers=headers)
        found = response.json()
        names = ("config", "timeout", "kind", "message")
        return response.status_code, {name: found.get(name) for name in names}

    small, large = answer(body), answer(body + b" " * 100_000)
    assert small == large or "char" in str(small)
    assert (small[0], set(small[1])) == (large[0], set(large[1]))  # type: ignore[call-overload]


def test_a_key_distinguishes_large_bodies_and_head_matches_get(own_operator: Operator) -> None:
    endpoint, _ = full_api(own_operator)
    key = {"Idempotency-Key": "k"}
    first = post(own_operator, endpoint, TEXT, **key).json()
    again = post(own_operator, endpoint, b" " + TEXT, **key).json()
    assert again == first
    one = f"{endpoint}/{first['job_id']}"
    assert own_operator.http.get(one).json()["job_status"]["config"] == json.loads(TEXT)["config"]
    head = own_operator.http.head(one)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(own_operator.http.get(one).content)
    other = own_operator.http.post(endpoint, content=ROWS, headers=key)
    assert (other.status_code, other.json()["kind"]) == (409, "conflict")


def test_a_killed_body_reader_is_replaced(own_operator: Operator) -> None:
    endpoint, _ = full_api(own_operator)
    post(own_operator, endpoint, TEXT)
    (pid,) = readers(own_operator)
    os.kill(pid, signal.SIGKILL)
    post(own_operator, endpoint, TEXT)
    (other,) = readers(own_operator)
    assert other != pid
    assert own_operator.stop() == 0
    assert not Path(f"/proc/{other}").exists()
    own_operator.start()


def readers(own_operator: Operator) -> list[int]:
    """The processes that read large bodies for the operator."""
    listed = subprocess.run(
        ["pgrep", "-P", str(own_operator.process.pid), "-f", "cortex.operator.http.body_reader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(pid) for pid in listed.stdout.split()]
