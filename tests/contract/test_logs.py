"""Logs: as a whole, from an offset, by range, and followed as Server-Sent Events."""

from __future__ import annotations

import json
from collections.abc import Iterator

from support import Operator

STREAM = {"Accept": "text/event-stream"}


def events(shared: Operator, url: str, **headers: str) -> Iterator[dict[str, str]]:
    with shared.http.stream("GET", url, headers={**STREAM, **headers}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield fields
                fields = {}


def test_the_whole_log_and_parts_of_it(shared: Operator, probe: str) -> None:
    job = shared.submit(probe, config={"do": "say", "lines": 3})
    shared.finished(probe, job)
    url = f"{probe}/{job['job_id']}/logs"
    assert shared.http.get(url).text == "line 0\nline 1\nline 2\n"
    assert shared.http.get(url, params={"offset": 7}).text == "line 1\nline 2\n"
    assert shared.http.get(url, params={"offset": 1000}).text == ""
    part = shared.http.get(url, headers={"Range": "bytes=0-5"})
    assert (part.status_code, part.text) == (206, "line 0")


def test_a_log_is_followed_to_its_end(shared: Operator, probe: str) -> None:
    job = shared.submit(probe, config={"do": "say", "lines": 5, "pause": 0.1})
    seen = list(events(shared, f"{probe}/{job['job_id']}/logs"))
    pieces = [json.loads(event["data"]) for event in seen if event["event"] == "log"]
    assert "".join(pieces) == "".join(f"line {n}\n" for n in range(5))
    assert len(pieces) > 1, "it came as it was written"
    assert seen[-1]["event"] == "end"
    assert json.loads(seen[-1]["data"])["status"] == "status_succeeded"
    assert seen[-2]["id"] == "35"


def test_a_follower_resumes_where_it_was(shared: Operator, probe: str) -> None:
    job = shared.submit(probe, config={"do": "say", "lines": 3})
    shared.finished(probe, job)
    seen = list(events(shared, f"{probe}/{job['job_id']}/logs", **{"Last-Event-ID": "14"}))
    assert [json.loads(event["data"]) for event in seen[:-1]] == ["line 2\n"]


def test_a_stopped_job_is_followed_to_its_last_line(shared: Operator, probe: str) -> None:
    job = shared.submit(probe, config={"do": "save_on_term"})
    text = ""
    for event in events(shared, f"{probe}/{job['job_id']}/logs"):
        if event["event"] == "end":
            break
        text += json.loads(event["data"])
        if "asleep" in text and "saved" not in text:
            shared.delete(probe, job)
    assert text == "asleep\nsaved\n"


def test_a_log_that_is_not_there_yet_is_empty(own: Operator) -> None:
    from support import PROBE, probe_yaml

    endpoint = own.deployed(probe_yaml().replace("1m", '"1"'), {"probe.py": PROBE})
    first = own.submit(endpoint, config={"do": "sleep", "s": 300})
    own.await_log(endpoint, first, "asleep")
    second = own.submit(endpoint)
    assert own.log_of(endpoint, second) == ""
    own.delete(endpoint, second)
    seen = list(events(own, f"{endpoint}/{second['job_id']}/logs"))
    assert [event["event"] for event in seen] == ["end"]
