"""CONTRACT.md, Errors, 429; and the limits of a cortex.yaml on how many jobs run and wait."""

from __future__ import annotations

from typing import Any

import pytest

from support import PROBE, Operator, probe_yaml, until

SLEEP = {"do": "sleep", "s": 300}


def deployed(own: Operator, limits: str, name: str = "probe") -> str:
    return own.deployed(probe_yaml(name, f"  limits: {{{limits}}}\n"), {"probe.py": PROBE})


def running(own: Operator, endpoint: str, job: Any) -> bool:
    return bool(own.status(endpoint, job).get("worker_counts") == {"pending": 0, "running": 1})


def refused(own: Operator, endpoint: str, **headers: str) -> str:
    response = own.http.post(endpoint, json={}, headers=headers)
    assert response.status_code == 429, response.text
    assert response.json()["kind"] == "limit.max_waiting"
    assert int(response.headers["retry-after"]) > 0
    return str(response.json()["message"])


def test_no_more_run_than_may_and_other_apis_go_by(own: Operator) -> None:
    endpoint = deployed(own, "max_running: 2")
    first, second = (own.submit(endpoint, config=SLEEP) for _ in range(2))
    until(lambda: running(own, endpoint, first) and running(own, endpoint, second), "two run")
    third, fourth = (own.submit(endpoint) for _ in range(2))
    other = own.deployed(probe_yaml("other"), {"probe.py": PROBE})
    assert own.run(other)["status"] == "status_succeeded"
    for job in (third, fourth):
        waiting = own.status(endpoint, job)
        assert waiting["worker_counts"] == {"pending": 1, "running": 0}
        assert "running, its limits.max_running" in waiting["message"]
        assert "max_running" in waiting["message"]
    own.delete(endpoint, first)
    ends = [own.finished(endpoint, job) for job in (third, fourth)]
    assert [end["status"] for end in ends] == ["status_succeeded"] * 2
    assert ends[0]["end_time"] <= ends[1]["start_time"]


def test_one_that_is_stopped_while_it_stands_aside_holds_nobody_up(own: Operator) -> None:
    endpoint = deployed(own, "max_running: 1")
    first = own.submit(endpoint, config=SLEEP)
    until(lambda: running(own, endpoint, first), "the first runs")
    aside = [own.submit(endpoint) for _ in range(3)]
    for job in aside[:2]:
        assert own.delete(endpoint, job).status_code == 200
    own.delete(endpoint, first)
    assert own.finished(endpoint, aside[2])["status"] == "status_succeeded"


def test_the_limit_holds_across_a_crash_of_the_operator(own: Operator) -> None:
    endpoint = deployed(own, "max_running: 1")
    first = own.submit(endpoint, config=SLEEP)
    until(lambda: running(own, endpoint, first), "the first runs")
    second = own.submit(endpoint)
    own.kill()
    own.start()
    endpoint = f"{own.url}/probe"
    assert own.run(own.deployed(probe_yaml("other"), {"probe.py": PROBE}))["end_time"]
    # Its environment is looked for anew, whatever the other API's job did meanwhile.
    until(lambda: "max_running" in own.status(endpoint, second).get("message", ""), "it is held up")
    own.delete(endpoint, first)
    assert own.finished(endpoint, second)["status"] == "status_succeeded"


def test_a_deploy_with_another_limit_holds_at_once_for_those_that_wait(own: Operator) -> None:
    endpoint = deployed(own, "max_running: 1")
    first, second, third = (own.submit(endpoint, config=SLEEP) for _ in range(3))
    until(lambda: running(own, endpoint, first), "the first runs")
    assert not running(own, endpoint, second)
    deployed(own, "max_running: 3")
    until(lambda: all(running(own, endpoint, job) for job in (second, third)), "all run")


def test_a_submit_beyond_max_waiting_is_refused_and_stores_nothing(own: Operator) -> None:
    endpoint = deployed(own, "max_running: 1, max_waiting: 2")
    first = own.submit(endpoint, config=SLEEP)
    until(lambda: running(own, endpoint, first), "the first runs")
    kept = own.http.post(endpoint, json={}, headers={"Idempotency-Key": "k"}).json()
    own.submit(endpoint)
    message = refused(own, endpoint)
    assert "'probe' already has 2 waiting jobs (limits.max_waiting)" in message
    refused(own, endpoint, **{"Idempotency-Key": "new"})
    assert len(own.http.get(endpoint).json()["job_statuses"]) == 3
    # A submit that was taken before is answered as it was: it adds no job.
    again = own.http.post(endpoint, json={}, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()["job_id"]) == (200, kept["job_id"])
    own.delete(endpoint, kept)
    assert own.http.post(endpoint, json={}).status_code == 200
    own.delete(endpoint, first)


def test_of_many_submits_at_once_no_more_are_taken_than_may_wait(own: Operator) -> None:
    from concurrent.futures import ThreadPoolExecutor

    endpoint = deployed(own, "max_running: 1, max_waiting: 5")
    first = own.submit(endpoint, config=SLEEP)
    until(lambda: running(own, endpoint, first), "the first runs")
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda _: own.http.post(endpoint, json={}).status_code, range(48)))
    assert sorted(codes) == [200] * 5 + [429] * 43


@pytest.mark.parametrize(
    ("limits", "wrong"),
    [
        ("max_running: 0", "limits.max_running: found 0; allowed: a whole number, 1 or more"),
        ("max_waiting: many", "limits.max_waiting"),
        ("log: 1Ki", 'limits.log: found "1Ki"; allowed: at least 64Ki'),
        ("max_runing: 1", 'did you mean "max_running"?'),
    ],
)
def test_limits_that_are_none_are_told(shared: Operator, limits: str, wrong: str) -> None:
    response = shared.deploy(
        probe_yaml("limited", f"  limits: {{{limits}}}\n"), {"probe.py": PROBE}
    )
    assert response.status_code == 400
    assert wrong in response.json()["message"]
