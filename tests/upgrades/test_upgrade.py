"""The current operator takes over the data of each earlier version, which `make.py` recorded."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import postgresql_server
from operator_harness import Operator, operator
from postgresql_server import PASSWORD, USER, PostgreSQLServer

FIXTURES = sorted(Path(__file__).parent.glob("*.tar.xz"))
# Otherwise retention would remove the jobs of an old fixture.
KEEP_ALL = ["--keep-jobs", "0", "--keep-logs", "0", "--keep-audit", "0"]
IN_PROGRESS = {"again", "waiting", "waiting long", "waiting of the new version", "running", "late"}
ECHO = {"base": 1, "nested": {"kept": True}}

pytestmark = pytest.mark.xdist_group("upgrades")  # these tests share one operator


@dataclass
class Upgraded:
    """The current operator on the data of an earlier version."""

    running: Operator
    before: Any
    """The answers of the old version."""

    def job(self, name: str) -> Any:
        """The `job_status` from the current operator."""
        answer = self.running.http.get(self.url(name), params={"wait": 100})
        assert answer.status_code == 200, (name, answer.text)
        return answer.json()["job_status"]

    def log(self, name: str) -> str:
        answer = self.running.http.get(f"{self.url(name)}/logs")
        assert answer.status_code == 200, (name, answer.text)
        return answer.content.decode("latin-1")

    def url(self, name: str) -> str:
        return f"{self.running.url}{self.before['jobs'][name]['path']}"

    def run(self, path: str, **body: object) -> Any:
        return self.running.run(self.running.url + path, **body)

    def audit(self) -> list[Any]:
        answer = self.running.http.get(f"{self.running.url}/-/audit", params={"limit": 1000})
        entries = answer.json()["entries"]
        assert isinstance(entries, list)
        return entries


@pytest.fixture(
    scope="module",
    params=[(each, store) for each in FIXTURES for store in ("sqlite", "postgresql")],
    ids=lambda param: f"{param[0].name.removesuffix('.tar.xz')}-{param[1]}",
)
def upgraded(request: pytest.FixtureRequest) -> Iterator[Upgraded]:
    archive, store = request.param
    with tempfile.TemporaryDirectory(prefix="cortex-upgrade-") as name:
        folder = Path(name)
        with tarfile.open(archive) as tar:
            members = [each for each in tar if each.name.split("/")[0] == store]
            tar.extractall(folder, members, filter="tar")
        folder /= store
        before = json.loads((folder / "expected.json").read_text())
        options = ["--files", f"file://{folder / 'files'}", "--require-token", *KEEP_ALL]
        about = (folder / "data" / "jobs").stat()
        with database(folder, request, f'"{about.st_dev}:{about.st_ino}"') as of_database:
            token = before["tokens"]["deploy"]
            with operator(folder, *options, *of_database, token=token) as running:
                yield Upgraded(running, before)


@contextmanager
def database(folder: Path, request: pytest.FixtureRequest, identity: str) -> Iterator[list[str]]:
    """The database of a fixture, as options of `cortex serve`.

    Args:
        identity: the device and inode of the jobs folder. Handles name it, and a copy of that
            folder has another one.
    """
    dump = folder / "dump.sql"
    if not dump.exists():
        with closing(sqlite3.connect(folder / "data" / "operator.db")) as own, own:
            own.execute("UPDATE jobs SET handle = replace(handle, '\"0:0\"', ?)", (identity,))
        yield []
        return
    server: PostgreSQLServer = request.getfixturevalue("postgresql")
    name = server.create()
    command = [postgresql_server.program("psql"), "-h", str(server.folder), "-U", USER, "-d", name]
    subprocess.run(
        [*command, "-q", "-v", "ON_ERROR_STOP=1", "-f", str(dump)],
        env={**os.environ, "PGPASSWORD": PASSWORD}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    with server.connected(name) as connection:
        connection.execute("UPDATE jobs SET handle = replace(handle, '\"0:0\"', %s)", (identity,))
    try:
        yield ["--store", server.url(name)]
    finally:
        server.drop(name)


def changed_fields(now: Any, before: Any, at: str = "") -> list[str]:
    """The fields of the old answer that the new one lacks or has with another value."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key, value in before.items()
            for line in (
                changed_fields(now[key], value, f"{at}.{key}") if key in now else [f"{at}.{key}"]
            )
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = zip(now, before, strict=True)
        return [
            line
            for n, (new, old) in enumerate(pairs)
            for line in changed_fields(new, old, f"{at}[{n}]")
        ]
    return [] if now == before else [f"{at}: {before!r} has become {now!r}"]


def test_there_is_a_fixture() -> None:
    assert FIXTURES


def test_a_finished_job_is_shown_as_before(upgraded: Upgraded) -> None:
    for name, job in upgraded.before["jobs"].items():
        if name not in IN_PROGRESS | {"stopping"}:
            answer = upgraded.running.http.get(upgraded.url(name)).json()
            before = job["answer"]
            before["endpoint"] = before["endpoint"].replace(
                upgraded.before["url"], upgraded.running.url
            )
            assert changed_fields(answer, before, name) == []


def test_logs_are_the_same_byte_for_byte(upgraded: Upgraded) -> None:
    """Includes logs with a gap, and logs that only the object store has."""
    for name, job in upgraded.before["jobs"].items():
        if name not in IN_PROGRESS:
            assert upgraded.log(name) == job["log"], name
    assert "of the log are gone: limits.log is 64 KiB]\n" in upgraded.log("cut")
    assert "of the log are gone: limits.log is 64 KiB]\n" in upgraded.log("cut dropped")


def test_files_of_a_job_are_there(upgraded: Upgraded) -> None:
    job_id = upgraded.before["jobs"]["saved"]["path"].split("/")[-1]
    saved = upgraded.running.data_dir / "jobs" / job_id / "files" / "saved.txt"
    assert saved.read_text() == "kept"


def test_a_job_that_ran_is_lost_with_its_machine(upgraded: Upgraded) -> None:
    job = upgraded.job("running")
    assert job["status"] == "status_unexpected_error"
    assert job["message"] == "the machine restarted while the job ran"
    assert upgraded.log("running") == upgraded.before["jobs"]["running"]["log"]


def test_a_job_that_ran_and_may_be_retried_starts_again(upgraded: Upgraded) -> None:
    job = upgraded.job("again")
    assert (job["status"], job["result"]) == ("status_succeeded", {"version": 1, "attempt": 2})
    log, before = upgraded.log("again"), upgraded.before["jobs"]["again"]["log"]
    assert log.startswith(before)
    words = (
        "cortex: attempt 1 was lost: the machine restarted while the job ran; attempt 2 begins\n"
    )
    assert log.removeprefix(before).startswith(f"{words}version 1 attempt 2 pid ")


def test_a_job_whose_stop_was_acknowledged_is_stopped(upgraded: Upgraded) -> None:
    job = upgraded.job("stopping")
    before = upgraded.before["jobs"]["stopping"]["answer"]["job_status"]
    del before["end_time"]  # its processes had not ended yet
    assert changed_fields(job, before) == []
    assert job["start_time"] <= job["end_time"]


@pytest.mark.parametrize(
    ("name", "version", "config"),
    [
        ("waiting", 1, {"mine": 1}),
        ("waiting long", 1, {"text": "long text " * 2000}),
        ("waiting of the new version", 2, {}),
    ],
)
def test_a_job_that_waited_runs_with_its_own_version(
    upgraded: Upgraded, name: str, version: int, config: dict[str, object]
) -> None:
    job = upgraded.job(name)
    assert job["status"] == "status_succeeded", job
    assert job["result"] == {"version": version, "config": ECHO | config}
    before = upgraded.before["jobs"][name]["answer"]["job_status"]
    assert job["api_id"] == before["api_id"]
    assert job["created_time"] == before["created_time"] < job["start_time"]


def test_a_job_whose_time_ran_out_meanwhile_has_timed_out(upgraded: Upgraded) -> None:
    job = upgraded.job("late")
    assert (job["status"], job["message"]) == (
        "status_timed_out",
        "timeout of 30 s passed while it waited",
    )


def test_a_deployed_api_accepts_jobs(upgraded: Upgraded) -> None:
    assert upgraded.run("/probe", config={"new": True})["result"] == {
        "version": 2,
        "config": ECHO | {"new": True},
    }
    assert upgraded.run("/talk")["status"] == "status_succeeded"
    assert upgraded.running.http.post(f"{upgraded.running.url}/gone", json={}).status_code == 404


def test_apis_are_listed_with_their_versions(upgraded: Upgraded) -> None:
    found = upgraded.running.http.get(f"{upgraded.running.url}/-/apis").json()
    for now, before in zip(found, upgraded.before["apis"], strict=True):
        assert changed_fields(now["spec"], before["spec"]) == []
        assert now["api_versions"] == before["api_versions"]


def test_tokens_work_and_a_revoked_one_does_not(upgraded: Upgraded) -> None:
    tokens = upgraded.before["tokens"]

    def code(name: str, method: str) -> int:
        headers = {"Authorization": f"Bearer {tokens[name]}"}
        url = f"{upgraded.running.url}/probe"
        body: dict[str, object] | None = {"config": {}} if method == "POST" else None
        return httpx.request(method, url, headers=headers, json=body, timeout=60).status_code

    assert [code(name, "GET") for name in tokens] == [200, 200, 200, 401]
    assert [code(name, "POST") for name in tokens] == [403, 200, 200, 401]


def test_an_idempotency_key_still_names_one_job(upgraded: Upgraded) -> None:
    for each in upgraded.before["keys"]:
        url = f"{upgraded.running.url}/-/apis/{each['api']}/jobs"
        headers = {"Idempotency-Key": each["key"]}
        again = upgraded.running.http.post(url, json=each["body"], headers=headers)
        assert again.status_code == 200, again.text
        assert changed_fields(again.json(), each["answer"]) == []
        other = {"config": {"other": True}}
        assert upgraded.running.http.post(url, json=other, headers=headers).status_code == 409


def test_the_audit_goes_on(upgraded: Upgraded) -> None:
    before = upgraded.before["audit"]["entries"]
    assert changed_fields(upgraded.audit()[-len(before) :], before) == []
    assert {"deploy", "delete", "stop", "create_token"} <= {each["action"] for each in before}
