"""CONTRACT.md, Errors, 429; and the limits of a cortex.yaml on how many jobs run and wait."""

from __future__ import annotations

from typing import Any

import pytest

from operator_harness import PROBE, Operator, probe_yaml, until

SLEEP = {"do": "sleep", "s": 300}


def deployed(own_operator: Operator, limits: str, name: str = "probe") -> str:
    return own_operator.deployed(probe_yaml(name, f"  limits: {{{limits}}}\n"), {"probe.py": PROBE})


def running(own_operator: Operator, endpoint: str, job: Any) -> bool:
    return bool(
        own_operator.status(endpoint, job).get("worker_counts") == {"pending": 0, "running": 1}
    )


def refused(own_operator: Operator, endpoint: str, **headers: str) -> str:
    response = own_operator.http.post(endpoint, json={}, headers=headers)
    assert response.status_code == 429, response.text
    assert response.json()["kind"] == "limit.max_waiting"
    assert int(response.headers["retry-after"]) > 0
    return str(response.json()["message"])


def test_no_more_run_than_may_and_other_apis_go_by(own_operator: Operator) -> None:
    endpoint = deployed(own_operator, "max_running: 2")
    first, second = (own_operator.submit(endpoint, config=SLEEP) for _ in range(2))
    until(
        lambda: running(own_operator, endpoint, first) and running(own_operator, endpoint, second),
        "two run",
    )
    third, fourth = (own_operator.submit(endpoint) for _ in range(2))
    other = own_operator.deployed(probe_yaml("other"), {"probe.py": PROBE})
    assert own_operator.run(other)["status"] == "status_succeeded"
    for job in (third, fourth):
        waiting = own_operator.status(endpoint, job)
        assert waiting["worker_counts"] == {"pending": 1, "running": 0}
        assert "running, its limits.max_running" in waiting["message"]
        assert "max_running" in waiting["message"]
    own_operator.delete(endpoint, first)
    ends = [own_operator.finished(endpoint, job) for job in (third, fourth)]
    assert [end["status"] for end in ends] == ["status_succeeded"] * 2
    assert ends[0]["end_time"] <= ends[1]["start_time"]


def test_one_that_is_stopped_while_it_stands_aside_holds_nobody_up(own_operator: Operator) -> None:
    endpoint = deployed(own_operator, "max_running: 1")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: running(own_operator, endpoint, first), "the first runs")
    aside = [own_operator.submit(endpoint) for _ in range(3)]
    for job in aside[:2]:
        assert own_operator.delete(endpoint, job).status_code == 200
    own_operator.delete(endpoint, first)
    assert own_operator.finished(endpoint, aside[2])["status"] == "status_succeeded"


def test_the_limit_holds_across_a_crash_of_the_operator(own_operator: Operator) -> None:
    endpoint = deployed(own_operator, "max_running: 1")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: running(own_operator, endpoint, first), "the first runs")
    second = own_operator.submit(endpoint)
    own_operator.kill()
    own_operator.start()
    endpoint = f"{own_operator.url}/probe"
    assert own_operator.run(own_operator.deployed(probe_yaml("other"), {"probe.py": PROBE}))[
        "end_time"
    ]
    # Its environment is looked for anew, whatever the other API's job did meanwhile.
    until(
        lambda: "max_running" in own_operator.status(endpoint, second).get("message", ""),
        "it is held up",
    )
    own_operator.delete(endpoint, first)
    assert own_operator.finished(endpoint, second)["status"] == "status_succeeded"


def test_a_deploy_with_another_limit_holds_at_once_for_those_that_wait(
    own_operator: Operator,
) -> None:
    endpoint = deployed(own_operator, "max_running: 1")
    first, second, third = (own_operator.submit(endpoint, config=SLEEP) for _ in range(3))
    until(lambda: running(own_operator, endpoint, first), "the first runs")
    assert not running(own_operator, endpoint, second)
    deployed(own_operator, "max_running: 3")
    until(lambda: all(running(own_operator, endpoint, job) for job in (second, third)), "all run")


def test_a_submit_beyond_max_waiting_is_refused_and_stores_nothing(own_operator: Operator) -> None:
    endpoint = deployed(own_operator, "max_running: 1, max_waiting: 2")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: running(own_operator, endpoint, first), "the first runs")
    kept = own_operator.http.post(endpoint, json={}, headers={"Idempotency-Key": "k"}).json()
    own_operator.submit(endpoint)
    message = refused(own_operator, endpoint)
    assert "'probe' already has 2 waiting jobs (limits.max_waiting)" in message
    refused(own_operator, endpoint, **{"Idempotency-Key": "new"})
    assert len(own_operator.http.get(endpoint).json()["job_statuses"]) == 3
    # A submit that was taken before is answered as it was: it adds no job.
    again = own_operator.http.post(endpoint, json={}, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()["job_id"]) == (200, kept["job_id"])
    own_operator.delete(endpoint, kept)
    assert own_operator.http.post(endpoint, json={}).status_code == 200
    own_operator.delete(endpoint, first)


def test_of_many_submits_at_once_no_more_are_taken_than_may_wait(own_operator: Operator) -> None:
    from concurrent.futures import ThreadPoolExecutor

    endpoint = deployed(own_operator, "max_running: 1, max_waiting: 5")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: running(own_operator, endpoint, first), "the first runs")
    with ThreadPoolExecutor(16) as pool:
        codes = list(
            pool.map(lambda _: own_operator.http.post(endpoint, json={}).status_code, range(48))
        )
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
def test_limits_that_are_none_are_told(shared_operator: Operator, limits: str, wrong: str) -> None:
    response = shared_operator.deploy(
        probe_yaml("limited", f"  limits: {{{limits}}}\n"), {"probe.py": PROBE}
    )
    assert response.status_code == 400
    assert wrong in response.json()["message"]
