"""Several operators on one PostgreSQL database, as behind a load balancer: each answers all requests, one
drives, and any of them may be killed or hang at any time."""

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
    refused,
    until,
)
from postgresql_server import PostgreSQLServer

LEASE_S = "5"  # on a busy machine, too, one that does not hang renews it in time
TRIO = pytest.mark.xdist_group("trio")  # one for all tests of it
ASLEEP = {"do": "sleep", "s": 300}


@pytest.fixture
def all_of_them(tmp_path: Path, database: str) -> Iterator[list[Operator]]:
    """Three for one test, which may do what it likes with them."""
    options = ["--store", database, "--cpu", "1", "--lease", LEASE_S]
    with operators(tmp_path, 3, *options) as running:
        yield running


@dataclass
class Trio:
    """Three that run for several tests, of which none ends or stops one."""

    database: str
    running: list[Operator]
    drives: Operator
    others: list[Operator]


@pytest.fixture(scope="module")
def trio(
    tmp_path_factory: pytest.TempPathFactory, postgresql: PostgreSQLServer, migrated_database: str
) -> Iterator[Trio]:
    name = postgresql.create(template=migrated_database)
    url = postgresql.url(name)
    folder = tmp_path_factory.mktemp("trio")
    # None of them is late so long that another one takes over.
    with operators(folder, 3, "--store", url, "--cpu", "1", "--lease", "120") as running:
        drives, others = roles(url, running)
        yield Trio(url, running, drives, others)
    postgresql.drop(name)


def driver(database: str, among: list[Operator]) -> Operator | None:
    """The one whose address is in the row of the one that drives."""
    with psycopg.connect(database) as connection:
        query = "SELECT address FROM operators WHERE term IS NOT NULL"
        row = connection.execute(query).fetchone()
    return None if row is None else next((o for o in among if o.url == row[0]), None)


def roles(database: str, among: list[Operator]) -> tuple[Operator, list[Operator]]:
    """The one that drives, and the others."""
    drives = driver(database, among)
    assert drives is not None
    return drives, [each for each in among if each is not drives]


def at(running: Operator, name: str = "probe") -> str:
    return f"{running.url}/{name}"


@pytest.fixture
def name(trio: Trio) -> Iterator[str]:
    """Of an API that is the test's own, and is deleted after it."""
    made = f"p{new_id()}"
    yield made
    trio.drives.http.delete(f"{trio.drives.url}/-/apis/{made}")


@TRIO
def test_the_driver_alone_tells_of_the_jobs(trio: Trio, name: str) -> None:
    other = trio.others[0]
    other.deployed(probe_yaml(name), {"probe.py": PROBE})
    ended = other.finished(at(other, name), other.submit(at(other, name), config={"do": "say"}))
    count = f'cortex_jobs_ended_total{{api="{name}",status="{ended["status"]}"}} 1.0'

    def told(by: Operator) -> list[str]:
        return by.http.get(f"{by.url}/metrics").text.splitlines()

    until(lambda: count in told(trio.drives), "the driver has counted it")
    assert "cortex_operator_drives 1.0" in told(trio.drives)
    for each in trio.others:
        assert "cortex_operator_drives 0.0" in told(each)
        of_jobs = ("cortex_job", "cortex_nodes{")
        assert not [line for line in told(each) if line.startswith(of_jobs)]


@TRIO
def test_what_one_is_told_all_know(trio: Trio, name: str) -> None:
    a, b, c = all_of_them = trio.running
    a.deployed(probe_yaml(name), {"probe.py": PROBE})
    job = b.submit(at(b, name), config={"do": "say"})  # at once, wherever the deploy went
    ended = c.finished(at(c, name), job)
    assert ended["status"] == "status_succeeded"
    for each in all_of_them:
        assert each.status(at(each, name), job) == ended
        assert each.log_of(at(each, name), job) == "line 0\n"
        assert [j["job_id"] for j in each.http.get(at(each, name)).json()["job_statuses"]] == [
            job["job_id"]
        ]
    assert b.http.delete(f"{b.url}/-/apis/{name}").status_code == 200
    for each in all_of_them:
        assert each.http.post(at(each, name), json={}).status_code == 404
    c.deployed(probe_yaml(name), {"probe.py": PROBE})
    for each in all_of_them:
        assert each.run(at(each, name))["status"] == "status_succeeded"


@TRIO
def test_any_stops_and_replays(trio: Trio, name: str) -> None:
    drives, (b, c) = trio.drives, trio.others
    b.deployed(probe_yaml(name), {"probe.py": PROBE})
    long = b.submit(at(b, name), config=ASLEEP)
    c.await_log(at(c, name), long, "asleep")
    assert c.delete(at(c, name), long).json() == {"message": f"stopped job {long['job_id']}"}
    for each in (drives, b, c):
        assert each.status(at(each, name), long)["status"] == "status_stopped"
        assert each.delete(at(each, name), long).status_code == 200
    until(lambda: not _workers_of(long), "its processes gone")
    keyed = {"Idempotency-Key": "one"}
    answers = [each.http.post(at(each, name), json={}, headers=keyed) for each in (drives, b, c)]
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    other = c.http.post(at(c, name), json={"config": {"x": 1}}, headers=keyed)
    assert other.status_code == 409


def _workers_of(job: Any) -> list[int]:
    return processes_with(f"CORTEX_JOB_ID={job['job_id']}")


def _status(operator: Operator, name: str, job: Any) -> Any:
    return operator.get(at(operator, name), job)["job_status"]


@TRIO
def test_what_only_the_driver_knows_any_tells(trio: Trio, name: str) -> None:
    drives, others = trio.drives, trio.others
    yaml = probe_yaml(name, "  limits: {max_running: 1}\n")
    others[0].deployed(yaml, {"probe.py": PROBE})
    long = others[0].submit(at(others[0], name), config=ASLEEP)
    others[1].await_log(at(others[1], name), long, "asleep")
    waits = others[1].submit(at(others[1], name))
    until(lambda: "message" in _status(drives, name, waits), "the driver has heard of it")
    for each in others:
        told = each.get(at(each, name), waits)
        assert "limits.max_running" in told["job_status"]["message"]
        assert told["endpoint"] == f"{at(each, name)}/{waits['job_id']}"
        page = each.http.get(at(each, name)).json()["job_statuses"]
        assert [job.get("message") for job in page] == [told["job_status"]["message"], None]
        assert each.http.get(f"{each.url}/-/cluster").json()["engine"] == "local"
        assert each.http.get(f"{each.url}/-/info").json()["capacity"]["cpu"] == 1
        for path in ("/-/apis", f"/-/apis/{name}"):
            assert at(each, name) in [a["endpoint"] for a in each.http.get(each.url + path).json()]
        by_name = f"{each.url}/-/apis/{name}/jobs/{waits['job_id']}"
        assert each.http.get(by_name).json()["job_status"] == told["job_status"]
        ranged = each.http.get(
            f"{at(each, name)}/{long['job_id']}/logs", headers={"Range": "bytes=2-3"}
        )
        assert (ranged.status_code, ranged.text) == (206, "le")
        beyond = each.http.get(
            f"{at(each, name)}/{long['job_id']}/logs", headers={"Range": "bytes=9-"}
        )
        assert beyond.status_code == 416
    drives.delete(at(drives, name), long)


@TRIO
def test_a_log_is_followed_to_its_end_through_any(trio: Trio, name: str) -> None:
    others = trio.others
    others[0].deployed(probe_yaml(name), {"probe.py": PROBE})
    job = others[0].submit(at(others[0], name), config={"do": "say", "lines": 20, "pause": 0.05})
    text = b"".join(_followed(at(others[1], name), job)).decode()
    # A slow follower gets several lines at once, a quick one may get a line without its end.
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
def test_limits_hold_over_all(trio: Trio, name: str) -> None:
    all_of_them = trio.running
    yaml = probe_yaml(name, "  limits: {max_running: 1, max_waiting: 3}\n")
    a, *_ = all_of_them
    a.deployed(yaml, {"probe.py": PROBE})
    a.await_log(at(a, name), a.submit(at(a, name), config=ASLEEP), "asleep")

    def submit(number: int) -> int:
        each = all_of_them[number % 3]
        return httpx.post(at(each, name), json={"config": ASLEEP}, timeout=60).status_code

    with ThreadPoolExecutor(12) as pool:
        codes = Counter(pool.map(submit, range(36)))
    assert codes == {200: 3, 429: 33}


@TRIO
def test_a_key_is_one_job_however_many_are_sent_at_once(trio: Trio, name: str) -> None:
    all_of_them = trio.running
    all_of_them[0].deployed(probe_yaml(name), {"probe.py": PROBE})

    def submit(number: int) -> str:
        each = all_of_them[number % 3]
        answer = httpx.post(
            at(each, name), json={}, headers={"Idempotency-Key": f"{number // 9}"}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["job_id"])

    with ThreadPoolExecutor(9) as pool:
        ids = list(pool.map(submit, range(45)))
    assert [len(set(ids[i : i + 9])) for i in range(0, 45, 9)] == [1] * 5


# The driver dies, or hangs


def test_when_the_driver_is_killed_another_takes_over(
    all_of_them: list[Operator], database: str
) -> None:
    drives, others = roles(database, all_of_them)
    others[0].deployed(probe_yaml(), {"probe.py": PROBE})
    running = others[0].submit(at(others[0]), config={"do": "sleep", "s": 3})
    others[1].await_log(at(others[1]), running, "asleep")
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(others[0].finished, at(others[0]), running)
        drives.kill()
        after = [each.submit(at(each)) for each in others for _ in range(3)]
        assert waited.result()["status"] == "status_succeeded"
    for job in after:
        for each in others:
            assert each.finished(at(each), job)["status"] == "status_succeeded"
    drives.start()
    assert drives.run(at(drives))["status"] == "status_succeeded"


def test_a_driver_that_ends_hands_over_at_once(all_of_them: list[Operator], database: str) -> None:
    drives, others = roles(database, all_of_them)
    others[0].deployed(probe_yaml(), {"probe.py": PROBE})
    assert drives.stop() == 0
    assert others[0].run(at(others[0]))["status"] == "status_succeeded"
    assert driver(database, others) is not None


def test_a_driver_that_hangs_is_superseded_and_goes_on_without_driving(
    all_of_them: list[Operator], database: str
) -> None:
    hung, others = roles(database, all_of_them)
    a, b = others
    a.deployed(probe_yaml(), {"probe.py": PROBE})
    asleep = a.submit(at(a), config={"do": "sleep", "s": 2})
    long = a.submit(at(a), config=ASLEEP)
    for job in (asleep, long):
        b.await_log(at(b), job, "asleep")
    with stopped(hung):
        told = [each.submit(at(each), config={"n": n}) for n, each in enumerate([a, b, a, b])]
        until(lambda: driver(database, others) is not None, "another one drives")
        assert a.delete(at(a), long).status_code == 200
        ended = [b.finished(at(b), job) for job in (asleep, *told)]
        assert {end["status"] for end in ended} == {"status_succeeded"}
    # From its first answer on it tells what the others have told.
    assert [hung.status(at(hung), job) for job in (asleep, *told)] == ended
    assert hung.status(at(hung), long)["status"] == "status_stopped"
    assert hung.run(at(hung))["status"] == "status_succeeded"
    until(lambda: "this operator steps down" in hung.log.read_text(), "it has noticed")
    assert driver(database, others) is not None
    for each in others:  # and it may drive again when its turn comes
        each.kill()
    assert hung.run(at(hung))["status"] == "status_succeeded"
    assert driver(database, [hung]) is hung


def test_while_nobody_drives_what_is_stored_is_told_and_taken(
    tmp_path: Path, database: str
) -> None:
    options = ["--store", database, "--cpu", "1", "--lease", "300"]
    with operators(tmp_path, 2, *options) as running:
        hung, (other,) = roles(database, running)
        other.deployed(probe_yaml(), {"probe.py": PROBE})
        long = other.submit(at(other), config=ASLEEP)
        until(
            lambda: other.status(at(other), long)["worker_counts"] == {"pending": 0, "running": 1},
            "it is stored that it runs",
        )
        with stopped(hung):
            job = other.submit(at(other))
            told = other.status(at(other), job)
            assert told["worker_counts"] == {"pending": 1, "running": 0}
            assert "message" not in told
            assert other.delete(at(other), long).status_code == 200
            assert other.status(at(other), long)["status"] == "status_stopped"
            listed = other.http.get(at(other)).json()["job_statuses"]
            assert [each["job_id"] for each in listed] == [job["job_id"], long["job_id"]]
            paths = ("/-/cluster", "/-/info", f"/probe/{job['job_id']}/logs")
            with ThreadPoolExecutor(len(paths)) as pool:  # each waits in vain for seconds
                answers = list(pool.map(lambda path: other.http.get(other.url + path), paths))
            for answer in answers:
                assert (answer.status_code, answer.json()["kind"]) == (503, "operator.no_driver")
                assert int(answer.headers["retry-after"]) > 0
        assert other.finished(at(other), job)["status"] == "status_succeeded"
        until(lambda: not _workers_of(long), "the stop was carried out")


@contextmanager
def stopped(running: Operator) -> Iterator[None]:
    """It hangs, for as long as the block runs."""
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(running.process.pid, signal.SIGCONT)


# Tokens, and how they are set up


def test_a_token_means_the_same_at_all(tmp_path: Path, database: str) -> None:
    def token(scope: str) -> str:
        done = preloaded_cli.run("token", "create", scope, "--scope", scope, "--store", database)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    deploy, reads = token("deploy"), {"Authorization": f"Bearer {token('read')}"}
    options = ["--store", database, "--cpu", "1", "--require-token"]
    with operators(tmp_path, 2, *options, token=deploy) as running:
        drives, (other,) = roles(database, running)
        other.deployed(probe_yaml("probe", "  limits: {max_running: 1}\n"), {"probe.py": PROBE})
        long = other.submit(at(other), config=ASLEEP)
        other.await_log(at(other), long, "asleep")
        waits = other.submit(at(other))
        until(
            lambda: "max_running" in other.status(at(other), waits).get("message", ""),
            "the driver has heard of it",
        )
        for url in (f"{at(other)}/{waits['job_id']}", f"{other.url}/-/cluster"):
            assert httpx.get(url, timeout=60).status_code == 401
            assert httpx.get(url, headers=reads, timeout=60).status_code == 200
        refused = httpx.delete(f"{at(other)}/{waits['job_id']}", headers=reads, timeout=60)
        assert refused.status_code == 403
        drives.delete(at(drives), long)


def test_what_does_not_go_together_is_refused(tmp_path: Path, database: str) -> None:
    with operators(tmp_path, 1, "--store", database, "--cpu", "1") as (running,):
        assert "belongs to another data folder" in refused(
            tmp_path / "elsewhere", "--store", database
        )
        assert "in use by another operator" in refused(running.data_dir)
        wrong = refused(running.data_dir, "--store", database, "--advertise", "ftp://x")
        assert "--advertise: not an operator's URL" in wrong
        ray = ["--engine", "ray", "--ray-address", "127.0.0.1:1"]
        assert "on another engine" in refused(running.data_dir, "--store", database, *ray)


def test_one_that_cannot_drive_when_its_turn_comes_ends_and_says_why(
    tmp_path: Path, database: str
) -> None:
    with operators(tmp_path, 2, "--store", database, "--cpu", "1") as running:
        drives, (unfit,) = roles(database, running)
        kept = drives.data_dir / "jobs" / ".import"
        kept.rename(kept.with_name("kept"))
        kept.write_text("in the way")
        drives.kill()
        assert unfit.process.wait(60) == 1
        told = unfit.log.read_text()
        assert "cannot be written" in told
        assert "Traceback" not in told
        kept.unlink()
        kept.with_name("kept").rename(kept)


@TRIO
def test_a_large_config_goes_through_whichever_operator_to_the_job_and_back(trio: Trio) -> None:
    text = "é" * 100_000
    first = trio.others[0]
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
