"""Backups that are taken while jobs and APIs change. An operator on each restored backup gives the
same answers as the first operator."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

import preloaded_cli
from operator_harness import FINAL, PROBE, Operator, operator, probe_yaml, until

BACKUPS, JOBS = 3, 12
APIS = 3
CONFIGS = [
    {"do": "say", "lines": 20},
    {"do": "fail", "message": "no"},
    {"do": "leave", "code": 3},
    {},
]


@dataclass
class Reported:
    """A job, as the answers to its client show it."""

    path: str
    job: dict[str, object]
    status: dict[str, Any]
    log: str | None


class Load:
    """Clients that submit, stop, deploy and delete, each in its own thread."""

    def __init__(self, own_operator: Operator, seed: int) -> None:
        self.own = own_operator
        self.reported: dict[str, Reported] = {}
        self.failed: list[str] = []
        self.is_over = threading.Event()
        self._uploading = threading.Lock()  # every upload packs the same folder
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, random.Random(seed + number)))
            for number, work in enumerate([self._submit] * 3 + [self._deploy])
        ]

    def __enter__(self) -> Self:
        for number in range(APIS):
            self._upload(number, 0)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        for thread in self._threads:
            thread.join()
        assert self.failed == []

    def _guarded(
        self, work: Callable[[httpx.Client, random.Random], None], dice: random.Random
    ) -> None:
        try:
            with httpx.Client(timeout=120) as http:
                while not self.is_over.is_set():
                    work(http, dice)
        except Exception as error:
            self.failed.append(repr(error))
            raise

    def _submit(self, http: httpx.Client, dice: random.Random) -> None:
        path = f"/probe{dice.randrange(APIS)}"
        answer = http.post(self.own.url + path, json={"config": dice.choice(CONFIGS)})
        if answer.status_code == 404:  # another thread has just deleted the API
            return
        assert answer.status_code == 200, answer.text
        job = answer.json()
        at = f"{self.own.url}{path}/{job['job_id']}"
        if dice.random() < 0.2:
            http.delete(at)
        found = http.get(at, params={"wait": 60}).json()["job_status"]
        assert found["status"] in FINAL, found
        if found["status"] == "status_stopped":  # final, but its processes may still write the log
            self.reported[job["job_id"]] = Reported(path, job, found, None)
        else:
            self.reported[job["job_id"]] = Reported(path, job, found, http.get(f"{at}/logs").text)

    def _deploy(self, http: httpx.Client, dice: random.Random) -> None:
        number = dice.randrange(APIS)
        if dice.random() < 0.3:
            http.delete(f"{self.own.url}/-/apis/probe{number}")
        self._upload(number, dice.randrange(1 << 30))

    def _upload(self, number: int, version: int) -> None:
        with self._uploading:
            self.own.deployed(probe_yaml(f"probe{number}"), {"probe.py": f"# {version}\n{PROBE}"})


def test_a_backup_has_every_final_job_with_its_reported_status(tmp_path: Path) -> None:
    with operator(tmp_path / "own", "--cpu", "2") as own_operator:
        taken: list[tuple[Path, set[str]]] = []
        with Load(own_operator, seed=7) as load:
            for number in range(BACKUPS):
                enough = len(load.reported) + JOBS
                until(lambda enough=enough: len(load.reported) >= enough, "some jobs have ended")
                before = set(load.reported)
                file = tmp_path / f"{number}.tar.gz"
                done = preloaded_cli.run(
                    "backup", str(file), "--data-dir", str(own_operator.data_dir)
                )
                assert done.returncode == 0, done.stderr
                taken.append((file, before))
        for number, (file, before) in enumerate(taken):
            folder = tmp_path / f"restored{number}"
            done = preloaded_cli.run("restore", str(file), "--data-dir", str(folder / "data"))
            assert done.returncode == 0, done.stderr
            final = _final(folder / "data" / "operator.db")
            assert before <= final  # the backup has every job that was final before it
            _check(folder, {each: load.reported[each] for each in final & load.reported.keys()})


def _final(database: Path) -> set[str]:
    """The jobs that are final in a backup."""
    is_final = "wanted = 'stop' OR state NOT IN ('waiting', 'starting', 'running')"
    with closing(sqlite3.connect(database)) as opened:
        return {job_id for (job_id,) in opened.execute(f"SELECT job_id FROM jobs WHERE {is_final}")}


def _check(folder: Path, final: dict[str, Reported]) -> None:
    with operator(folder) as other:
        for job_id, reported in final.items():
            at = f"{other.url}/-/apis/{reported.path[1:]}/jobs/{job_id}"
            found = other.http.get(at).json()["job_status"]
            assert _shown(found) == _shown(reported.status)
            if reported.log is not None:
                assert other.http.get(f"{at}/logs").text == reported.log
        for api in other.http.get(f"{other.url}/-/apis").json():
            path = "/" + api["spec"]["networking"]["endpoint"]
            assert other.run(other.url + path)["status"] == "status_succeeded"


def _shown(status: dict[str, Any]) -> dict[str, Any]:
    """The part of a final status that never changes. The processes of a stopped job end later."""
    later = {"worker_counts", "exit_code"} if status["status"] == "status_stopped" else set()
    return {name: value for name, value in status.items() if name not in later}
