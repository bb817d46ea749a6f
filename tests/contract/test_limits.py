"""The limits in cortex.yaml on running and waiting jobs, and the error 429."""

from __future__ import annotations

from typing import Any

import pytest

from operator_harness import PROBE, Operator, probe_yaml, until

SLEEP = {"do": "sleep", "s": 300}


def deploy(own_operator: Operator, limits: str, name: str = "probe") -> str:
    return own_operator.deployed(probe_yaml(name, f"  limits: {{{limits}}}\n"), {"probe.py": PROBE})


def is_running(own_operator: Operator, endpoint: str, job: Any) -> bool:
    return bool(
        own_operator.status(endpoint, job).get("worker_counts") == {"pending": 0, "running": 1}
    )


def refusal(own_operator: Operator, endpoint: str, **headers: str) -> str:
    response = own_operator.http.post(endpoint, json={}, headers=headers)
    assert response.status_code == 429, response.text
    assert response.json()["kind"] == "limit.max_waiting"
    assert int(response.headers["retry-after"]) > 0
    return str(response.json()["message"])


def test_max_running_holds_and_blocks_no_other_api(own_operator: Operator) -> None:
    endpoint = deploy(own_operator, "max_running: 2")
    first, second = (own_operator.submit(endpoint, config=SLEEP) for _ in range(2))
    until(
        lambda: (
            is_running(own_operator, endpoint, first) and is_running(own_operator, endpoint, second)
        ),
        "two jobs run",
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


def test_a_job_stopped_while_it_waits_for_max_running_blocks_no_other(
    own_operator: Operator,
) -> None:
    endpoint = deploy(own_operator, "max_running: 1")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: is_running(own_operator, endpoint, first), "the first job runs")
    waiting = [own_operator.submit(endpoint) for _ in range(3)]
    for job in waiting[:2]:
        assert own_operator.delete(endpoint, job).status_code == 200
    own_operator.delete(endpoint, first)
    assert own_operator.finished(endpoint, waiting[2])["status"] == "status_succeeded"


def test_max_running_holds_across_a_crash_of_the_operator(own_operator: Operator) -> None:
    endpoint = deploy(own_operator, "max_running: 1")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: is_running(own_operator, endpoint, first), "the first job runs")
    second = own_operator.submit(endpoint)
    own_operator.kill()
    own_operator.start()
    endpoint = f"{own_operator.url}/probe"
    assert own_operator.run(own_operator.deployed(probe_yaml("other"), {"probe.py": PROBE}))[
        "end_time"
    ]
    # The new operator first makes the environment ready again, for each API apart.
    until(
        lambda: "max_running" in own_operator.status(endpoint, second).get("message", ""),
        "the second job waits for max_running",
    )
    own_operator.delete(endpoint, first)
    assert own_operator.finished(endpoint, second)["status"] == "status_succeeded"


def test_a_newly_deployed_limit_applies_at_once_to_waiting_jobs(
    own_operator: Operator,
) -> None:
    endpoint = deploy(own_operator, "max_running: 1")
    first, second, third = (own_operator.submit(endpoint, config=SLEEP) for _ in range(3))
    until(lambda: is_running(own_operator, endpoint, first), "the first job runs")
    assert not is_running(own_operator, endpoint, second)
    deploy(own_operator, "max_running: 3")
    until(
        lambda: all(is_running(own_operator, endpoint, job) for job in (second, third)),
        "all three jobs run",
    )


def test_a_submit_beyond_max_waiting_is_refused_and_stores_nothing(own_operator: Operator) -> None:
    endpoint = deploy(own_operator, "max_running: 1, max_waiting: 2")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: is_running(own_operator, endpoint, first), "the first job runs")
    keyed = own_operator.http.post(endpoint, json={}, headers={"Idempotency-Key": "k"}).json()
    own_operator.submit(endpoint)
    message = refusal(own_operator, endpoint)
    assert "'probe' already has 2 waiting jobs (limits.max_waiting)" in message
    refusal(own_operator, endpoint, **{"Idempotency-Key": "new"})
    assert len(own_operator.http.get(endpoint).json()["job_statuses"]) == 3
    # A repeated submit gets its first answer: it adds no job.
    again = own_operator.http.post(endpoint, json={}, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()["job_id"]) == (200, keyed["job_id"])
    own_operator.delete(endpoint, keyed)
    assert own_operator.http.post(endpoint, json={}).status_code == 200
    own_operator.delete(endpoint, first)


def test_concurrent_submits_do_not_exceed_max_waiting(own_operator: Operator) -> None:
    from concurrent.futures import ThreadPoolExecutor

    endpoint = deploy(own_operator, "max_running: 1, max_waiting: 5")
    first = own_operator.submit(endpoint, config=SLEEP)
    until(lambda: is_running(own_operator, endpoint, first), "the first job runs")
    with ThreadPoolExecutor(16) as pool:
        codes = list(
            pool.map(lambda _: own_operator.http.post(endpoint, json={}).status_code, range(48))
        )
    assert sorted(codes) == [200] * 5 + [429] * 43


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("max_running: 0", "limits.max_running: found 0; allowed: a whole number, 1 or more"),
        ("max_waiting: many", "limits.max_waiting"),
        ("log: 1Ki", 'limits.log: found "1Ki"; allowed: at least 64Ki'),
        ("max_runing: 1", 'did you mean "max_running"?'),
    ],
)
def test_invalid_limits_are_refused_with_a_reason(
    shared_operator: Operator, limits: str, message: str
) -> None:
    response = shared_operator.deploy(
        probe_yaml("limited", f"  limits: {{{limits}}}\n"), {"probe.py": PROBE}
    )
    assert response.status_code == 400
    assert message in response.json()["message"]
