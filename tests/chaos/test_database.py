"""An operator whose PostgreSQL server is killed or restarted loses nothing and stores nothing by
half. It resumes when the server is back, without a restart of the operator."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

import operator_harness
import preloaded_cli
from operator_harness import PROBE, Operator, operator, probe_yaml, until
from postgresql_server import PASSWORD, PostgreSQLServer, server

ASLEEP = {"do": "sleep", "s": 300}


@contextmanager
def operator_on_server(
    tmp_path: Path, *options: str
) -> Iterator[tuple[Operator, PostgreSQLServer]]:
    """An operator with its own PostgreSQL server."""
    with server() as running:
        url = running.url(running.create())
        with operator(tmp_path, "--store", url, "--cpu", "1", *options) as operated:
            yield operated, running


def code(running: Operator, path: str) -> int:
    return running.http.get(running.url + path).status_code


def ready(running: Operator) -> bool:
    return code(running, "/readyz") == 200


def test_a_server_that_is_killed_loses_nothing_and_all_goes_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    with operator_on_server(tmp_path) as (running, database):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        done = running.run(endpoint, config={"do": "say"})
        short = running.submit(endpoint, config={"do": "sleep", "s": 1})
        long = running.submit(endpoint, config=ASLEEP)
        for job in (short, long):
            running.await_log(endpoint, job, "asleep")
        database.kill()
        for refused in (
            running.http.post(endpoint, json={}, headers={"Idempotency-Key": "k"}),
            running.http.get(f"{endpoint}/{done['job_id']}"),
            running.http.delete(f"{endpoint}/{long['job_id']}"),
            running.http.delete(f"{running.url}/-/apis/probe"),
            running.deploy(probe_yaml("two"), {"probe.py": PROBE}),
            running.http.get(f"{running.url}/readyz"),
        ):
            assert (refused.status_code, refused.json()["kind"]) == (503, "storage.unavailable")
            assert int(refused.headers["retry-after"]) > 0
            assert PASSWORD not in refused.text
        assert code(running, "/healthz") == 200
        time.sleep(2)  # the short job ends meanwhile, and no operator can store its end
        database.start()
        until(lambda: ready(running), "it is ready again")
        assert running.status(endpoint, done) == done
        ended = running.finished(endpoint, short)
        assert (ended["status"], ended["result"]) == ("status_succeeded", "rested")
        assert running.status(endpoint, long)["status"] == "status_running"
        listed = running.http.get(endpoint).json()["job_statuses"]
        known = {j["job_id"] for j in (done, short, long)}
        assert {job["job_id"] for job in listed} == known
        folders = {path.name for path in (running.data_dir / "jobs").iterdir()}
        assert {name for name in folders if not name.startswith(".")} == known
        assert len(running.http.get(f"{running.url}/-/apis").json()) == 1
        assert running.run(endpoint)["status"] == "status_succeeded"
        assert running.delete(endpoint, long).status_code == 200


def test_exactly_the_acknowledged_submits_are_stored_when_the_server_is_killed_under_load(
    tmp_path: Path,
) -> None:
    """Without an idempotency key, a job exists if and only if its client got that answer."""
    with operator_on_server(tmp_path) as (running, database):
        yaml = probe_yaml("probe", "  limits: {max_running: 1}\n")
        endpoint = running.deployed(yaml, {"probe.py": PROBE})
        first = running.submit(endpoint, config=ASLEEP)
        running.await_log(endpoint, first, "asleep")
        are_done = False
        answers: list[httpx.Response] = []

        def acknowledged() -> list[str]:
            return [answer.json()["job_id"] for answer in answers if answer.status_code == 200]

        def submit(_: int) -> None:
            with httpx.Client(timeout=60) as client:
                while not are_done:
                    answer = client.post(endpoint, json={})
                    answers.append(answer)
                    if answer.status_code != 200:
                        time.sleep(0.05)

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(submit, number) for number in range(8)]
            try:
                for number, pause_s in enumerate((0.5, 0.3, 0.7, 0.4), 1):
                    until(
                        lambda minimum=15 * number: len(acknowledged()) > minimum,
                        "the operator accepts jobs",
                    )
                    time.sleep(pause_s)
                    database.kill()
                    database.start()
                    until(lambda: ready(running), "it is ready again")
            finally:
                are_done = True
            for client in clients:
                client.result()
        codes = Counter(answer.status_code for answer in answers)
        assert codes.keys() <= {200, 503}, codes
        stored: list[str] = []
        cursor = None
        while cursor is not None or not stored:
            query = {"limit": 1000, **({"cursor": cursor} if cursor else {})}
            page = running.http.get(endpoint, params=query).json()
            stored += [job["job_id"] for job in page["job_statuses"]]
            cursor = page["next_cursor"]
        assert sorted(stored) == sorted([*acknowledged(), first["job_id"]])


def test_an_operator_that_is_killed_with_its_server_finds_everything_again(tmp_path: Path) -> None:
    with operator_on_server(tmp_path) as (running, database):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint, config={"do": "sleep", "s": 1})
        running.await_log(endpoint, job, "asleep")
        database.kill()
        running.kill()
        time.sleep(1.5)
        database.start()
        running.start()
        ended = running.finished(f"{running.url}/probe", job)
        assert (ended["status"], ended["result"]) == ("status_succeeded", "rested")


def test_jobs_run_when_the_server_is_back_although_their_version_could_not_be_read(
    tmp_path: Path,
) -> None:
    """The server goes down before the environment of the jobs is built."""
    with operator_on_server(tmp_path) as (running, database):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        jobs = [running.submit(endpoint) for _ in range(3)]
        database.kill()
        time.sleep(1)
        database.start()
        until(lambda: ready(running), "it is ready again")
        for job in jobs:
            assert running.finished(endpoint, job)["status"] == "status_succeeded"


def test_an_operator_ends_at_once_while_its_server_is_down(tmp_path: Path) -> None:
    with operator_on_server(tmp_path) as (running, database):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint, config=ASLEEP)
        running.await_log(endpoint, job, "asleep")
        database.kill()
        assert running.stop() == 0
        database.start()
        running.start()
        assert running.status(f"{running.url}/probe", job)["status"] == "status_running"


# At the start


def start_refused(folder: Path, *options: str) -> str:
    """The error of `cortex serve` when it does not start."""
    message = operator_harness.startup_error(folder, *options)
    assert PASSWORD not in message
    return message


def test_an_unusable_store_is_reported_at_the_start(tmp_path: Path, database: str) -> None:
    data = tmp_path / "data"
    assert "authentication failed" in start_refused(data, "--store", database.replace("%3A", "x"))
    assert "'mysql' is not a supported database" in start_refused(
        data, "--store", "mysql://u:pw@h/d"
    )


def test_token_commands_use_the_same_store_whether_a_flag_a_variable_or_a_file_names_it(
    tmp_path: Path, database: str
) -> None:
    config = tmp_path / "operator.yaml"
    config.write_text(f"store: {database}\n")

    def cortex(*words: str, **variables: str) -> str:
        done = preloaded_cli.run("token", *words, env={**os.environ, **variables})
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = cortex("create", "ci", "--scope", "deploy", "--store", database).strip()
    with operator(tmp_path, "--require-token", "--store", database, token=made) as running:
        assert code(running, "/-/apis") == 200
        assert "ci" in cortex("list", CORTEX_SERVE_STORE=database)
        cortex("revoke", "ci", "--config", str(config))
        assert code(running, "/-/apis") == 401
        named = {"CORTEX_CONFIG": str(config)}
        made = cortex("create", "again", "--scope", "deploy", **named).strip()
        running.http.headers["Authorization"] = f"Bearer {made}"
    assert not (tmp_path / "data" / "operator.db").exists()
