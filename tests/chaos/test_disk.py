"""An operator whose disk is full, read-only or damaged loses nothing and stores nothing by half. It
resumes when the disk is repaired, without a restart."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import preloaded_cli
from chaos.disk import Disk, mounted
from operator_harness import PROBE, Operator, operator, probe_yaml, until

SLEEP = {"do": "sleep", "s": 300}
WAITS = """
    def wait(self, config):
        print("asleep", flush=True)
        while not os.path.exists(config["go"]):
            time.sleep(0.01)
        return "rested"
"""


@contextmanager
def operator_on_disk(
    tmp_path: Path, part: str = "", options: str = "size=48m"
) -> Iterator[tuple[Operator, Disk]]:
    """An operator whose data folder, or a part of it, is on a small disk."""
    with (
        mounted(tmp_path / "data" / part, options) as disk,
        operator(tmp_path, "--cpu", "1") as running,
    ):
        yield running, disk


def code(running: Operator, path: str) -> int:
    return running.http.get(running.url + path).status_code


def test_a_full_disk_loses_nothing_and_all_goes_on_when_it_has_room(tmp_path: Path) -> None:
    with operator_on_disk(tmp_path) as (running, disk):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE + WAITS})
        done = running.run(endpoint, config={"do": "say"})
        go = tmp_path / "go"
        short = running.submit(endpoint, config={"do": "wait", "go": str(go)})
        long = running.submit(endpoint, config=SLEEP)
        for job in (short, long):
            running.await_log(endpoint, job, "asleep")
        disk.fill()
        key = {"Idempotency-Key": "k"}
        for _ in range(3):
            refused = running.http.post(endpoint, json={}, headers=key)
            assert (refused.status_code, refused.json()["kind"]) == (503, "storage.unavailable")
            assert int(refused.headers["retry-after"]) > 0
        deploy = running.deploy(probe_yaml("two"), {"probe.py": PROBE, "big": "x" * 10_000_000})
        assert (deploy.status_code, deploy.json()["kind"]) == (503, "storage.unavailable")
        assert running.http.delete(f"{running.url}/-/apis/probe").status_code == 503
        assert running.delete(endpoint, long).status_code == 503
        # Stored data stays readable, and the refused changes have stored nothing.
        assert running.status(endpoint, done) == done
        assert running.log_of(endpoint, done) == "line 0\n"
        listed = running.http.get(endpoint).json()["job_statuses"]
        assert {job["job_id"] for job in listed} == {j["job_id"] for j in (done, short, long)}
        assert len(running.http.get(f"{running.url}/-/apis").json()) == 1
        assert len(os.listdir(running.data_dir / "projects")) == 1
        assert (code(running, "/healthz"), code(running, "/readyz")) == (200, 503)
        go.touch()
        time.sleep(2)  # the short job ends meanwhile, and its end cannot be stored
        assert running.status(endpoint, short)["status"] == "status_running"
        disk.empty()
        until(lambda: code(running, "/readyz") == 200, "it is ready again")
        ended = running.finished(endpoint, short)
        assert (ended["status"], ended["result"]) == ("status_succeeded", "rested")
        assert running.status(endpoint, long)["status"] == "status_running"
        again = running.http.post(endpoint, json={}, headers=key).json()
        assert running.finished(endpoint, again)["status"] == "status_succeeded"
        assert running.delete(endpoint, long).status_code == 200
        assert len(running.http.get(endpoint).json()["job_statuses"]) == 4


def test_an_operator_that_is_killed_on_a_full_disk_finds_everything_again(tmp_path: Path) -> None:
    with operator_on_disk(tmp_path) as (running, disk):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint, config={"do": "sleep", "s": 1})
        running.await_log(endpoint, job, "asleep")
        disk.fill()
        running.kill()
        time.sleep(1.5)
        disk.empty()
        running.start()
        ended = running.finished(f"{running.url}/probe", job)
        assert (ended["status"], ended["result"]) == ("status_succeeded", "rested")


def test_a_job_whose_folder_cannot_be_made_waits_and_says_why(tmp_path: Path) -> None:
    with operator_on_disk(tmp_path, "jobs", "size=1m,nr_inodes=8") as (running, disk):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        fillers = []
        with pytest.raises(OSError, match="No space"):
            for number in range(100):
                (disk.folder / f".{number}").mkdir()
                fillers.append(disk.folder / f".{number}")
        first, second = running.submit(endpoint), running.submit(endpoint, timeout=1)
        until(
            lambda: "No space" in running.status(endpoint, first).get("message", ""),
            "the job's message says why",
        )
        assert running.status(endpoint, first)["worker_counts"] == {"pending": 1, "running": 0}
        # A timeout still ends a waiting job.
        assert running.finished(endpoint, second)["status"] == "status_timed_out"
        for folder in fillers:
            folder.rmdir()
        disk.remount("nr_inodes=1000")
        assert running.finished(endpoint, first)["status"] == "status_succeeded"


def test_a_job_whose_folder_cannot_be_filled_waits_and_can_be_stopped(tmp_path: Path) -> None:
    with operator_on_disk(tmp_path, "jobs", "size=1m") as (running, disk):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        disk.fill()
        jobs = [running.submit(endpoint) for _ in range(3)]
        for job in jobs:
            until(
                lambda j=job: "No space" in running.status(endpoint, j).get("message", ""),
                "the job's message says why",
            )
        assert running.delete(endpoint, jobs[0]).status_code == 200
        disk.empty()
        ends = [running.finished(endpoint, job)["status"] for job in jobs]
        assert ends == ["status_stopped", "status_succeeded", "status_succeeded"]


def test_the_build_of_an_environment_waits_for_disk_space(tmp_path: Path) -> None:
    with operator_on_disk(tmp_path, "environments", "size=8k") as (running, disk):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint)
        until(
            lambda: "full" in running.status(endpoint, job).get("message", ""),
            "the job's message says why",
        )
        disk.remount("size=100m")
        assert running.finished(endpoint, job)["status"] == "status_succeeded"


def test_a_disk_that_becomes_read_only_refuses_writes_until_it_is_mended(tmp_path: Path) -> None:
    with operator_on_disk(tmp_path, "jobs") as (running, disk):
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        done = running.run(endpoint)
        disk.remount("ro")
        job = running.submit(endpoint)
        until(
            lambda: "Read-only" in running.status(endpoint, job).get("message", ""),
            "the job's message says why",
        )
        assert running.status(endpoint, done) == done
        disk.remount("rw")
        assert running.finished(endpoint, job)["status"] == "status_succeeded"


def serve_until_exit(data: Path) -> tuple[int, str]:
    """The exit status and the errors of `cortex serve`, which does not start."""
    done = preloaded_cli.run("serve", "--port", "0", "--data-dir", str(data))
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_a_read_only_data_folder_is_reported_at_the_start(tmp_path: Path) -> None:
    with mounted(tmp_path / "data") as disk:
        disk.remount("ro")
        status, words = serve_until_exit(tmp_path / "data")
        assert status == 1
        assert "Read-only file system" in words
        assert "--data-dir" in words


def test_a_full_disk_is_reported_at_the_start(tmp_path: Path) -> None:
    with mounted(tmp_path / "data") as disk:
        disk.fill()
        status, words = serve_until_exit(tmp_path / "data")
        assert status == 1
        assert "full" in words or "No space" in words


@pytest.mark.parametrize("damage", ["head", "tail", "empty header", "no database"])
def test_a_damaged_database_is_reported_and_left_unchanged(tmp_path: Path, damage: str) -> None:
    with operator(tmp_path) as running:
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        running.run(endpoint)
    database = tmp_path / "data" / "operator.db"
    content = database.read_bytes()
    half = len(content) // 2
    damaged = {
        "head": b"\xff" * half + content[half:],
        "tail": content[:5000] + b"\xff" * (len(content) - 5000),
        "empty header": bytes(100) + content[100:],
        "no database": b"this was never a database\n" * 1000,
    }[damage]
    database.write_bytes(damaged)
    status, words = serve_until_exit(tmp_path / "data")
    assert status == 1
    assert "database" in words
    assert database.read_bytes() == damaged


def test_a_damaged_table_is_reported_as_unavailable_storage(tmp_path: Path) -> None:
    with operator(tmp_path) as running:
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        running.run(endpoint)
        running.stop()
        database = running.data_dir / "operator.db"
        connection = sqlite3.connect(database)
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'jobs_of_api'"
        (page,) = connection.execute(query).fetchone()
        connection.close()
        content = database.read_bytes()
        start = (page - 1) * size
        database.write_bytes(content[:start] + b"\xff" * size + content[start + size :])
        running.start()
        answer = running.http.get(f"{running.url}/probe")
        assert (answer.status_code, answer.json()["kind"]) == (503, "storage.unavailable")
        answer = running.http.post(f"{running.url}/probe", json={})
        assert (answer.status_code, answer.json()["kind"]) == (503, "storage.unavailable")
        running.stop()
        database.write_bytes(content)


@pytest.mark.parametrize(
    ("part", "status", "words"),
    [
        ("projects", "status_unexpected_error", "deploy it again"),
        ("environments", "status_succeeded", ""),
        ("jobs", "status_succeeded", ""),
    ],
)
def test_removed_folders_are_rebuilt_or_reported(
    tmp_path: Path, part: str, status: str, words: str
) -> None:
    with operator(tmp_path) as running:
        running.deployed(probe_yaml(), {"probe.py": PROBE})
        old = running.run(f"{running.url}/probe")
        running.stop()
        subprocess.run(["rm", "-rf", *map(str, (running.data_dir / part).iterdir())], check=True)
        running.start()
        endpoint = f"{running.url}/probe"
        done = running.run(endpoint)
        assert done["status"] == status
        assert words in done.get("message", "")
        assert running.status(endpoint, old) == old
        assert running.http.get(f"{endpoint}/{old['job_id']}/logs").status_code == 200
