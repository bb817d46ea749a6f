"""Logs: complete, from an offset, by range, and followed as Server-Sent Events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from operator_harness import PROBE, WAIT_TIMEOUT_S, Operator, probe_yaml

STREAM = {"Accept": "text/event-stream"}


def events(shared_operator: Operator, url: str, **headers: str) -> Iterator[dict[str, str]]:
    with shared_operator.http.stream("GET", url, headers={**STREAM, **headers}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line.startswith(":"):
                continue  # the operator sends comments while the log is idle
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield fields
                fields = {}


def test_the_whole_log_and_parts_of_it(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "say", "lines": 3})
    shared_operator.finished(probe, job)
    url = f"{probe}/{job['job_id']}/logs"
    assert shared_operator.http.get(url).text == "line 0\nline 1\nline 2\n"
    assert shared_operator.http.get(url, params={"offset": 7}).text == "line 1\nline 2\n"
    assert shared_operator.http.get(url, params={"offset": 1000}).text == ""


@pytest.mark.parametrize(
    ("header", "status", "text", "content_range"),
    [
        ("bytes=0-5", 206, "line 0", "bytes 0-5/21"),
        ("bytes=7-", 206, "line 1\nline 2\n", "bytes 7-20/21"),
        ("bytes=-7", 206, "line 2\n", "bytes 14-20/21"),
        ("bytes=14-999", 206, "line 2\n", "bytes 14-20/21"),
        ("bytes=0-1,3-4", 200, "line 0\nline 1\nline 2\n", None),
        ("lines=1-2", 200, "line 0\nline 1\nline 2\n", None),
        ("bytes=5-2", 200, "line 0\nline 1\nline 2\n", None),
        ("bytes=-", 200, "line 0\nline 1\nline 2\n", None),
    ],
)
def test_a_range_of_a_log_is_served(
    shared_operator: Operator,
    probe: str,
    header: str,
    status: int,
    text: str,
    content_range: str | None,
) -> None:
    job = shared_operator.submit(probe, config={"do": "say", "lines": 3})
    shared_operator.finished(probe, job)
    part = shared_operator.http.get(f"{probe}/{job['job_id']}/logs", headers={"Range": header})
    assert (part.status_code, part.text) == (status, text)
    assert part.headers.get("content-range") == content_range


def test_a_range_beyond_the_end_is_416(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "say", "lines": 3})
    shared_operator.finished(probe, job)
    answer = shared_operator.http.get(
        f"{probe}/{job['job_id']}/logs", headers={"Range": "bytes=21-"}
    )
    assert (answer.status_code, answer.json()["kind"]) == (416, "request.range_not_satisfiable")


def test_a_log_is_read_whole_while_it_grows(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(
        "- name: chatty\n  kind: TaskAPI\n  compute: {cpu: 1m}\n  limits: {log: 1G}\n"
        "  definition: {command: [sh, -c, 'yes | head -c 200000000']}\n",
        {},
    )
    job = shared_operator.submit(endpoint)
    while "end_time" not in shared_operator.status(endpoint, job):
        assert set(shared_operator.log_of(endpoint, job)) <= {"y", "\n"}
    assert shared_operator.finished(endpoint, job)["status"] == "status_succeeded"


def test_a_log_is_followed_to_its_end(
    shared_operator: Operator, probe: str, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    config = {"do": "say", "lines": 5, "go": str(go)}
    job = shared_operator.submit(probe, config=config, timeout=WAIT_TIMEOUT_S)
    received = []
    for event in events(shared_operator, f"{probe}/{job['job_id']}/logs"):
        received.append(event)
        go.touch()  # without this pause a slow follower could get all lines in one event
    pieces = [json.loads(event["data"]) for event in received if event["event"] == "log"]
    assert "".join(pieces) == "".join(f"line {n}\n" for n in range(5))
    assert len(pieces) > 1, "the log arrived in several events, while it was written"
    assert received[-1]["event"] == "end"
    assert json.loads(received[-1]["data"])["status"] == "status_succeeded"
    assert received[-2]["id"] == "35"


def test_a_follower_resumes_after_its_last_event(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, config={"do": "say", "lines": 3})
    shared_operator.finished(probe, job)
    received = list(
        events(shared_operator, f"{probe}/{job['job_id']}/logs", **{"Last-Event-ID": "14"})
    )
    assert [json.loads(event["data"]) for event in received[:-1]] == ["line 2\n"]


def test_a_stopped_job_is_followed_to_its_last_line(long_grace_operator: Operator) -> None:
    endpoint = long_grace_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = long_grace_operator.submit(endpoint, config={"do": "save_on_term"})
    text = ""
    for event in events(long_grace_operator, f"{endpoint}/{job['job_id']}/logs"):
        if event["event"] == "end":
            break
        text += json.loads(event["data"])
        if "asleep" in text and "saved" not in text:
            long_grace_operator.delete(endpoint, job)
    assert text == "asleep\nsaved\n"


def test_a_log_that_does_not_exist_yet_is_empty(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml().replace("1m", '"1"'), {"probe.py": PROBE})
    first = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, first, "asleep")
    second = own_operator.submit(endpoint)
    assert own_operator.log_of(endpoint, second) == ""
    own_operator.delete(endpoint, second)
    received = list(events(own_operator, f"{endpoint}/{second['job_id']}/logs"))
    assert [event["event"] for event in received] == ["end"]


@pytest.mark.parametrize("resumed", ["9" * 18, "9" * 5000, "-1", "x"])
def test_a_follower_from_any_offset_gets_the_end_event(
    shared_operator: Operator, probe: str, resumed: str
) -> None:
    job = shared_operator.submit(probe, config={"do": "say", "lines": 1})
    shared_operator.finished(probe, job)
    url = f"{probe}/{job['job_id']}/logs?offset={2**63 - 1}"
    (end,) = events(shared_operator, url, **{"Last-Event-ID": resumed})
    assert end["event"] == "end"
