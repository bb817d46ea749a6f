"""Several operators on one PostgreSQL database, as behind a load balancer.

Each operator answers all requests, one of them is the leader, and each may die or hang at any time.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

import preloaded_cli
from cortex.spec.times import new_id
from operator_harness import (
    PROBE,
    Operator,
    operators,
    probe_yaml,
    processes_with,
    startup_error,
    until,
)
from postgresql_server import PostgreSQLServer

LEASE_S = "5"  # long enough to be renewed in time on a busy machine
TRIO = pytest.mark.xdist_group("trio")  # all tests of the trio share it in one test process
ASLEEP = {"do": "sleep", "s": 300}


@pytest.fixture
def three_operators(tmp_path: Path, database: str) -> Iterator[list[Operator]]:
    """Three operators for one test, which may kill and stop them."""
    options = ["--store", database, "--cpu", "1", "--lease", LEASE_S]
    with operators(tmp_path, 3, *options) as running:
        yield running


@dataclass
class Trio:
    """Three operators for several tests, which must not kill or stop them."""

    database: str
    running: list[Operator]
    leader: Operator
    followers: list[Operator]


@pytest.fixture(scope="module")
def trio(
    tmp_path_factory: pytest.TempPathFactory, postgresql: PostgreSQLServer, migrated_database: str
) -> Iterator[Trio]:
    name = postgresql.create(template=migrated_database)
    url = postgresql.url(name)
    folder = tmp_path_factory.mktemp("trio")
    # With this lease no operator replaces the leader because of a delay.
    with operators(folder, 3, "--store", url, "--cpu", "1", "--lease", "120") as running:
        leader, followers = roles(url, running)
        yield Trio(url, running, leader, followers)
    postgresql.drop(name)


def leader_of(database: str, among: list[Operator]) -> Operator | None:
    """The leader: the operator whose address is in the leader's row."""
    with psycopg.connect(database) as connection:
        query = "SELECT address FROM operators WHERE term IS NOT NULL"
        row = connection.execute(query).fetchone()
    return None if row is None else next((o for o in among if o.url == row[0]), None)


def roles(database: str, among: list[Operator]) -> tuple[Operator, list[Operator]]:
    """The leader and the followers."""
    leader = leader_of(database, among)
    assert leader is not None
    return leader, [each for each in among if each is not leader]


def at(running: Operator, api_name: str = "probe") -> str:
    return f"{running.url}/{api_name}"


@pytest.fixture
def api_name(trio: Trio) -> Iterator[str]:
    """The name of the test's own API, which is deleted after the test."""
    made = f"p{new_id()}"
    yield made
    trio.leader.http.delete(f"{trio.leader.url}/-/apis/{made}")


@TRIO
def test_only_the_leader_exports_metrics_of_jobs(trio: Trio, api_name: str) -> None:
    other = trio.followers[0]
    other.deployed(probe_yaml(api_name), {"probe.py": PROBE})
    ended = other.finished(
        at(other, api_name), other.submit(at(other, api_name), config={"do": "say"})
    )
    count = f'cortex_jobs_ended_total{{api="{api_name}",status="{ended["status"]}"}} 1.0'

    def metrics(by: Operator) -> list[str]:
        return by.http.get(f"{by.url}/metrics").text.splitlines()

    until(lambda: count in metrics(trio.leader), "the leader has counted the end")
    assert "cortex_operator_drives 1.0" in metrics(trio.leader)
    for each in trio.followers:
        assert "cortex_operator_drives 0.0" in metrics(each)
        of_jobs = ("cortex_job", "cortex_nodes{")
        assert not [line for line in metrics(each) if line.startswith(of_jobs)]


@TRIO
def test_every_operator_knows_what_another_stored(trio: Trio, api_name: str) -> None:
    a, b, c = three_operators = trio.running
    a.deployed(probe_yaml(api_name), {"probe.py": PROBE})
    # At once, although another operator deployed the API.
    job = b.submit(at(b, api_name), config={"do": "say"})
    ended = c.finished(at(c, api_name), job)
    assert ended["status"] == "status_succeeded"
    for each in three_operators:
        assert each.status(at(each, api_name), job) == ended
        assert each.log_of(at(each, api_name), job) == "line 0\n"
        assert [j["job_id"] for j in each.http.get(at(each, api_name)).json()["job_statuses"]] == [
            job["job_id"]
        ]
    assert b.http.delete(f"{b.url}/-/apis/{api_name}").status_code == 200
    for each in three_operators:
        assert each.http.post(at(each, api_name), json={}).status_code == 404
    c.deployed(probe_yaml(api_name), {"probe.py": PROBE})
    for each in three_operators:
        assert each.run(at(each, api_name))["status"] == "status_succeeded"


@TRIO
def test_every_operator_stops_jobs_and_replays_keys(trio: Trio, api_name: str) -> None:
    leader, (b, c) = trio.leader, trio.followers
    b.deployed(probe_yaml(api_name), {"probe.py": PROBE})
    long = b.submit(at(b, api_name), config=ASLEEP)
    c.await_log(at(c, api_name), long, "asleep")
    assert c.delete(at(c, api_name), long).json() == {"message": f"stopped job {long['job_id']}"}
    for each in (leader, b, c):
        assert each.status(at(each, api_name), long)["status"] == "status_stopped"
        assert each.delete(at(each, api_name), long).status_code == 200
    until(lambda: not _processes_of(long), "its processes have exited")
    keyed = {"Idempotency-Key": "one"}
    answers = [
        each.http.post(at(each, api_name), json={}, headers=keyed) for each in (leader, b, c)
    ]
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    other = c.http.post(at(c, api_name), json={"config": {"x": 1}}, headers=keyed)
    assert other.status_code == 409


def _processes_of(job: Any) -> list[int]:
    return processes_with(f"CORTEX_JOB_ID={job['job_id']}")


def _status(operator: Operator, api_name: str, job: Any) -> Any:
    return operator.get(at(operator, api_name), job)["job_status"]


@TRIO
def test_every_operator_answers_what_only_the_leader_knows(trio: Trio, api_name: str) -> None:
    leader, followers = trio.leader, trio.followers
    yaml = probe_yaml(api_name, "  limits: {max_running: 1}\n")
    followers[0].deployed(yaml, {"probe.py": PROBE})
    long = followers[0].submit(at(followers[0], api_name), config=ASLEEP)
    followers[1].await_log(at(followers[1], api_name), long, "asleep")
    waits = followers[1].submit(at(followers[1], api_name))
    until(lambda: "message" in _status(leader, api_name, waits), "the leader knows the job")
    for each in followers:
        view = each.get(at(each, api_name), waits)
        assert "limits.max_running" in view["job_status"]["message"]
        assert view["endpoint"] == f"{at(each, api_name)}/{waits['job_id']}"
        page = each.http.get(at(each, api_name)).json()["job_statuses"]
        assert [job.get("message") for job in page] == [view["job_status"]["message"], None]
        assert each.http.get(f"{each.url}/-/cluster").json()["engine"] == "local"
        assert each.http.get(f"{each.url}/-/info").json()["capacity"]["cpu"] == 1
        for path in ("/-/apis", f"/-/apis/{api_name}"):
            assert at(each, api_name) in [
                a["endpoint"] for a in each.http.get(each.url + path).json()
            ]
        by_name = f"{each.url}/-/apis/{api_name}/jobs/{waits['job_id']}"
        assert each.http.get(by_name).json()["job_status"] == view["job_status"]
        ranged = each.http.get(
            f"{at(each, api_name)}/{long['job_id']}/logs", headers={"Range": "bytes=2-3"}
        )
        assert (ranged.status_code, ranged.text) == (206, "le")
        beyond = each.http.get(
            f"{at(each, api_name)}/{long['job_id']}/logs", headers={"Range": "bytes=9-"}
        )
        assert beyond.status_code == 416
    leader.delete(at(leader, api_name), long)


@TRIO
def test_a_log_is_followed_to_its_end_through_a_follower(trio: Trio, api_name: str) -> None:
    followers = trio.followers
    followers[0].deployed(probe_yaml(api_name), {"probe.py": PROBE})
    job = followers[0].submit(
        at(followers[0], api_name), config={"do": "say", "lines": 20, "pause": 0.05}
    )
    text = b"".join(_followed(at(followers[1], api_name), job)).decode()
    # A slow client gets several lines at once, a fast client may get a part of a line.
    assert text.index("line 19") < text.index("event: end")
    assert "status_succeeded" in text


def _followed(endpoint: str, job: Any) -> Iterator[bytes]:
    with httpx.stream(
        "GET",
        f"{endpoint}/{job['job_id']}/logs",
        headers={"Accept": "text/event-stream"},
        timeout=60,
    ) as followed:
        yield from followed.iter_raw()


@TRIO
def test_limits_hold_over_all_operators(trio: Trio, api_name: str) -> None:
    three_operators = trio.running
    yaml = probe_yaml(api_name, "  limits: {max_running: 1, max_waiting: 3}\n")
    a, *_ = three_operators
    a.deployed(yaml, {"probe.py": PROBE})
    a.await_log(at(a, api_name), a.submit(at(a, api_name), config=ASLEEP), "asleep")

    def submit(number: int) -> int:
        each = three_operators[number % 3]
        return httpx.post(at(each, api_name), json={"config": ASLEEP}, timeout=60).status_code

    with ThreadPoolExecutor(12) as pool:
        codes = Counter(pool.map(submit, range(36)))
    assert codes == {200: 3, 429: 33}


@TRIO
def test_a_key_makes_one_job_of_many_concurrent_submits(trio: Trio, api_name: str) -> None:
    three_operators = trio.running
    three_operators[0].deployed(probe_yaml(api_name), {"probe.py": PROBE})

    def submit(number: int) -> str:
        each = three_operators[number % 3]
        answer = httpx.post(
            at(each, api_name), json={}, headers={"Idempotency-Key": f"{number // 9}"}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["job_id"])

    with ThreadPoolExecutor(9) as pool:
        ids = list(pool.map(submit, range(45)))
    assert [len(set(ids[i : i + 9])) for i in range(0, 45, 9)] == [1] * 5


# The leader dies, or hangs


def test_another_operator_replaces_a_killed_leader(
    three_operators: list[Operator], database: str
) -> None:
    leader, followers = roles(database, three_operators)
    followers[0].deployed(probe_yaml(), {"probe.py": PROBE})
    running = followers[0].submit(at(followers[0]), config={"do": "sleep", "s": 3})
    followers[1].await_log(at(followers[1]), running, "asleep")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(followers[0].finished, at(followers[0]), running)
        leader.kill()
        after = [each.submit(at(each)) for each in followers for _ in range(3)]
        assert waiting.result()["status"] == "status_succeeded"
    for job in after:
        for each in followers:
            assert each.finished(at(each), job)["status"] == "status_succeeded"
    leader.start()
    assert leader.run(at(leader))["status"] == "status_succeeded"


def test_a_leader_that_shuts_down_hands_over_at_once(
    three_operators: list[Operator], database: str
) -> None:
    leader, followers = roles(database, three_operators)
    followers[0].deployed(probe_yaml(), {"probe.py": PROBE})
    assert leader.stop() == 0
    assert followers[0].run(at(followers[0]))["status"] == "status_succeeded"
    assert leader_of(database, followers) is not None


def test_a_leader_that_hangs_is_replaced_and_continues_as_a_follower(
    three_operators: list[Operator], database: str
) -> None:
    hung, followers = roles(database, three_operators)
    a, b = followers
    a.deployed(probe_yaml(), {"probe.py": PROBE})
    asleep = a.submit(at(a), config={"do": "sleep", "s": 2})
    long = a.submit(at(a), config=ASLEEP)
    for job in (asleep, long):
        b.await_log(at(b), job, "asleep")
    with hanging(hung):
        jobs = [each.submit(at(each), config={"n": n}) for n, each in enumerate([a, b, a, b])]
        until(lambda: leader_of(database, followers) is not None, "another operator leads")
        assert a.delete(at(a), long).status_code == 200
        ended = [b.finished(at(b), job) for job in (asleep, *jobs)]
        assert {end["status"] for end in ended} == {"status_succeeded"}
    # Already its first answers are those of the other operators.
    assert [hung.status(at(hung), job) for job in (asleep, *jobs)] == ended
    assert hung.status(at(hung), long)["status"] == "status_stopped"
    assert hung.run(at(hung))["status"] == "status_succeeded"
    until(
        lambda: "this operator steps down" in hung.log.read_text(),
        "the former leader has stepped down",
    )
    assert leader_of(database, followers) is not None
    for each in followers:  # it can become leader again
        each.kill()
    assert hung.run(at(hung))["status"] == "status_succeeded"
    assert leader_of(database, [hung]) is hung


def test_without_a_leader_stored_data_is_served_and_changes_are_stored(
    tmp_path: Path, database: str
) -> None:
    options = ["--store", database, "--cpu", "1", "--lease", "300"]
    with operators(tmp_path, 2, *options) as running:
        hung, (other,) = roles(database, running)
        other.deployed(probe_yaml(), {"probe.py": PROBE})
        long = other.submit(at(other), config=ASLEEP)
        until(
            lambda: other.status(at(other), long)["worker_counts"] == {"pending": 0, "running": 1},
            "the start is stored",
        )
        with hanging(hung):
            job = other.submit(at(other))
            status = other.status(at(other), job)
            assert status["worker_counts"] == {"pending": 1, "running": 0}
            assert "message" not in status
            assert other.delete(at(other), long).status_code == 200
            assert other.status(at(other), long)["status"] == "status_stopped"
            listed = other.http.get(at(other)).json()["job_statuses"]
            assert [each["job_id"] for each in listed] == [job["job_id"], long["job_id"]]
            paths = ("/-/cluster", "/-/info", f"/probe/{job['job_id']}/logs")
            with ThreadPoolExecutor(len(paths)) as pool:  # each request waits in vain for seconds
                answers = list(pool.map(lambda path: other.http.get(other.url + path), paths))
            for answer in answers:
                assert (answer.status_code, answer.json()["kind"]) == (503, "operator.no_driver")
                assert int(answer.headers["retry-after"]) > 0
        assert other.finished(at(other), job)["status"] == "status_succeeded"
        until(lambda: not _processes_of(long), "the job is stopped")


@contextmanager
def hanging(running: Operator) -> Iterator[None]:
    """Stop the operator's process (SIGSTOP) for the duration of the block."""
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(running.process.pid, signal.SIGCONT)


# Tokens and options


def test_a_token_is_valid_at_every_operator(tmp_path: Path, database: str) -> None:
    def token(scope: str) -> str:
        done = preloaded_cli.run("token", "create", scope, "--scope", scope, "--store", database)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    deploy, reads = token("deploy"), {"Authorization": f"Bearer {token('read')}"}
    options = ["--store", database, "--cpu", "1", "--require-token"]
    with operators(tmp_path, 2, *options, token=deploy) as running:
        leader, (other,) = roles(database, running)
        other.deployed(probe_yaml("probe", "  limits: {max_running: 1}\n"), {"probe.py": PROBE})
        long = other.submit(at(other), config=ASLEEP)
        other.await_log(at(other), long, "asleep")
        waits = other.submit(at(other))
        until(
            lambda: "max_running" in other.status(at(other), waits).get("message", ""),
            "the leader knows the job",
        )
        for url in (f"{at(other)}/{waits['job_id']}", f"{other.url}/-/cluster"):
            assert httpx.get(url, timeout=60).status_code == 401
            assert httpx.get(url, headers=reads, timeout=60).status_code == 200
        refused = httpx.delete(f"{at(other)}/{waits['job_id']}", headers=reads, timeout=60)
        assert refused.status_code == 403
        leader.delete(at(leader), long)


def test_conflicting_options_and_folders_are_refused(tmp_path: Path, database: str) -> None:
    with operators(tmp_path, 1, "--store", database, "--cpu", "1") as (running,):
        assert "belongs to another data folder" in startup_error(
            tmp_path / "elsewhere", "--store", database
        )
        assert "in use by another operator" in startup_error(running.data_dir)
        wrong = startup_error(running.data_dir, "--store", database, "--advertise", "ftp://x")
        assert "--advertise: not an operator's URL" in wrong
        ray = ["--engine", "ray", "--ray-address", "127.0.0.1:1"]
        assert "on another engine" in startup_error(running.data_dir, "--store", database, *ray)


def test_an_operator_that_cannot_lead_exits_with_the_reason(tmp_path: Path, database: str) -> None:
    with operators(tmp_path, 2, "--store", database, "--cpu", "1") as running:
        leader, (unfit,) = roles(database, running)
        preparation = leader.data_dir / "jobs" / ".import"
        preparation.rename(preparation.with_name("renamed"))
        preparation.write_text("a file instead of a folder")
        leader.kill()
        assert unfit.process.wait(60) == 1
        log = unfit.log.read_text()
        assert "cannot be written" in log
        assert "Traceback" not in log
        preparation.unlink()
        preparation.with_name("renamed").rename(preparation)


@TRIO
def test_a_large_config_passes_through_every_operator(trio: Trio) -> None:
    text = "é" * 100_000
    first = trio.followers[0]
    first.deployed(probe_yaml("large"), {"probe.py": PROBE})
    runs = first.submit(f"{first.url}/large", config={**ASLEEP, "text": text})
    job = first.submit(f"{first.url}/large", config={"text": text})
    for each in trio.running:
        endpoint = f"{each.url}/large"
        assert each.status(endpoint, runs)["config"]["text"] == text
        end = each.finished(endpoint, job)
        assert end["config"]["text"] == end["result"]["text"] == text
        listed = each.http.get(endpoint).json()["job_statuses"]
        assert [status["truncated"] for status in listed] == [["config", "result"], ["config"]]
    first.delete(f"{first.url}/large", runs)


@TRIO
def test_a_job_that_no_machine_can_run_is_refused_by_the_leader(trio: Trio, api_name: str) -> None:
    """The leader alone knows the machines: the others store such a job, and the leader ends it."""
    leader, follower = trio.leader, trio.followers[0]
    yaml = probe_yaml(api_name).replace("cpu: 1m", "cpu: 2")
    [by_follower] = follower.deploy(yaml, {"probe.py": PROBE}).json()
    assert by_follower["warnings"] == []
    [by_leader] = leader.deploy(yaml, {"probe.py": PROBE}).json()
    [warning] = by_leader["warnings"]
    assert warning.endswith("needs 2 CPU, this machine has 1")
    refused = leader.http.post(f"{leader.url}/{api_name}", json={})
    assert (refused.status_code, refused.json()["kind"]) == (409, "conflict")
    job = follower.submit(f"{follower.url}/{api_name}")
    done = follower.finished(f"{follower.url}/{api_name}", job)
    assert done["status"] == "status_unexpected_error"
    assert done["message"] == "needs 2 CPU, this machine has 1"
    # The leader learns at once that another operator has deployed a version that fits.
    assert follower.deploy(probe_yaml(api_name), {"probe.py": PROBE}).status_code == 200
    assert leader.http.post(f"{leader.url}/{api_name}", json={}).status_code == 200
