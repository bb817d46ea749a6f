"""An operator with an object store on a real S3 server.

Covers what the operator uploads, what it still has after its machine was lost, and how it works
while the server cannot be reached.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from network_gate import NetworkGate, network_gate
from operator_harness import (
    PROBE,
    Operator,
    operator,
    operators,
    probe_yaml,
    processes_with,
    startup_error,
    until,
)
from postgresql_server import PostgreSQLServer
from s3_server import S3Server

pytestmark = pytest.mark.xdist_group("s3")  # the S3 server starts slowly
SAY = {"do": "say", "lines": 3}
SAY_LOG = "line 0\nline 1\nline 2\n"
ASLEEP = {"do": "sleep", "s": 300}


@pytest.fixture(scope="module", autouse=True)
def credentials(s3: S3Server) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        yield patch


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.bucket()


@pytest.fixture
def gate(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[NetworkGate]:
    """A gate between the test's own operator and the S3 server."""
    with network_gate(s3.port) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.url)
        yield made


@dataclass
class ArchivingOperator:
    """An operator with an object store behind a gate. The tests that share it may shut the gate."""

    running: Operator
    s3: S3Server
    bucket: str
    gate: NetworkGate
    older_job: Any
    """A job that finished before the operator had an object store."""

    @property
    def endpoint(self) -> str:
        return f"{self.running.url}/probe"

    def project(self) -> Path:
        """The project folder of the API's current version."""
        found = self.running.http.get(f"{self.running.url}/-/apis/probe").json()[0]
        return self.running.data_dir / "projects" / str(found["spec"]["project_id"])

    def is_archived(self, job: Any) -> bool:
        return is_archived(self.s3, self.bucket, job)

    def is_marked(self, job: Any) -> bool:
        return self.mark(job).exists()

    def mark(self, job: Any) -> Path:
        return self.running.data_dir / "archived" / str(job["job_id"])

    def folder(self, job: Any) -> Path:
        return self.running.data_dir / "jobs" / str(job["job_id"])


@pytest.fixture(scope="module")
def archiving(
    s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ArchivingOperator]:
    bucket = s3.bucket()
    with network_gate(s3.port) as gate, operator(tmp_path_factory.mktemp("kept")) as running:
        job = running.submit(deploy_probe(running), config=SAY)
        running.finished(f"{running.url}/probe", job)
        running.kill()
        running.options += ("--files", f"s3://{bucket}/some/prefix")
        running.environment["AWS_ENDPOINT_URL_S3"] = gate.url
        running.start()
        yield ArchivingOperator(running, s3, bucket, gate, job)


@dataclass
class Replacement:
    """Two data folders with one database and bucket. The second replaced the first."""

    first: Operator
    lost_folder: str
    second: Operator
    options: list[str]
    bucket: str
    spec: Any
    finished: Any
    finished_status: Any
    running: list[Any]


@pytest.fixture(scope="module")
def replacement(
    s3: S3Server,
    postgresql: PostgreSQLServer,
    migrated_database: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Replacement]:
    database, bucket = postgresql.create(template=migrated_database), s3.bucket()
    options = ["--store", postgresql.url(database), "--files", f"s3://{bucket}/some/prefix"]
    folder = tmp_path_factory.mktemp("moved")
    (folder / "first").mkdir()
    first = Operator(folder / "first", "--grace", "1", *options)
    first.start()
    try:
        endpoint = deploy_probe(first)
        finished = first.submit(endpoint, config=SAY)
        finished_status = first.finished(endpoint, finished)
        jobs = [first.submit(endpoint, config=each) for each in (ASLEEP, {"do": "stubborn"})]
        for job in jobs:
            first.await_log(endpoint, job, "asleep")
        until(lambda: is_archived(s3, bucket, finished), "the log is archived")
        spec = first.http.get(f"{first.url}/-/apis").json()[0]["spec"]
        first.kill()
        lost_folder = (first.data_dir / "folder.id").read_text()
        with operator(folder / "second", *options, "--lost-folder", lost_folder) as second:
            yield Replacement(
                first, lost_folder, second, options, bucket, spec, finished, finished_status, jobs
            )
    finally:
        first.kill()
        first.http.close()
        for pid in processes_with(str(first.data_dir)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not processes_with(str(first.data_dir)), "all processes have exited")
    postgresql.drop(database)


def deploy_probe(running: Operator) -> str:
    return running.deployed(probe_yaml(), {"probe.py": PROBE, "empty/.keep": ""})


def is_archived(s3: S3Server, bucket: str, job: Any) -> bool:
    return f"some/prefix/logs/{job['job_id']}/log" in s3.keys(bucket)


def test_data_in_the_object_store_outlives_the_machine(replacement: Replacement) -> None:
    second, job = replacement.second, replacement.finished
    endpoint = f"{second.url}/probe"
    assert second.http.get(f"{second.url}/-/apis").json()[0]["spec"] == replacement.spec
    assert second.status(endpoint, job) == replacement.finished_status
    assert second.log_of(endpoint, job) == SAY_LOG
    url = f"{endpoint}/{job['job_id']}/logs"
    part = second.http.get(url, headers={"Range": "bytes=7-12"})
    assert (part.status_code, part.text) == (206, "line 1")
    events = second.http.get(url, headers={"Accept": "text/event-stream"}).text
    assert "line 2" in events
    assert "event: end" in events
    assert second.run(endpoint, config={"x": 1})["status"] == "status_succeeded"


def test_only_jobs_of_the_folder_declared_lost_end(replacement: Replacement) -> None:
    second = replacement.second
    endpoint = f"{second.url}/probe"
    for job in replacement.running:
        found = second.finished(endpoint, job)
        assert found["status"] == "status_unexpected_error"
        assert f"was lost, with the data folder {replacement.lost_folder}" in found["message"]
        answer = second.http.get(f"{endpoint}/{job['job_id']}/logs")
        assert (answer.status_code, answer.json()["kind"]) == (404, "not_found")
        assert "lost before the log was sent" in answer.json()["message"]
    # `--lost-folder` stays set, and does not affect jobs of the new folder.
    mine = second.submit(endpoint, config=ASLEEP)
    second.await_log(endpoint, mine, "asleep")
    second.kill()
    second.start()
    endpoint = f"{second.url}/probe"
    assert second.status(endpoint, mine)["status"] == "status_running"
    second.delete(endpoint, mine)
    second.finished(endpoint, mine)


def test_a_folder_that_may_still_run_jobs_must_be_declared_lost(
    replacement: Replacement, tmp_path: Path
) -> None:
    identity = (replacement.second.data_dir / "folder.id").read_text()
    assert f"--lost-folder {identity}" in startup_error(tmp_path / "third", *replacement.options)
    # A folder whose operator runs is not lost.
    error = startup_error(tmp_path / "third", *replacement.options, "--lost-folder", identity)
    assert f"{identity} is not lost: the operator at {replacement.second.url} uses it" in error
    # Another database with this bucket: the bucket belongs to the second folder.
    error = startup_error(tmp_path / "fourth", *replacement.options[2:])
    assert f"belongs with another data folder, {identity}" in error
    # The first folder is not dead after all: its operator must not start.
    error = startup_error(replacement.first.data_dir, *replacement.options)
    assert "belongs to another data folder" in error


def test_every_operator_serves_a_log_that_another_archived(
    s3: S3Server, bucket: str, database: str, tmp_path: Path
) -> None:
    options = ("--store", database, "--files", f"s3://{bucket}/some/prefix")
    with operators(tmp_path, 2, *options) as (one, other):
        endpoint = deploy_probe(one)
        job = other.submit(f"{other.url}/probe", config=SAY)
        one.finished(endpoint, job)
        until((one.data_dir / "archived" / job["job_id"]).exists, "the log is archived")
        for each in (one, other):
            shutil.rmtree(one.data_dir / "jobs" / job["job_id"])
            assert each.log_of(f"{each.url}/probe", job) == SAY_LOG


def test_a_missing_bucket_is_refused_at_the_start(tmp_path: Path) -> None:
    assert "no bucket 'nothere'. Create it" in startup_error(tmp_path, "--files", "s3://nothere/x")


def test_older_projects_and_logs_are_uploaded_to_a_new_object_store(
    archiving: ArchivingOperator,
) -> None:
    until(
        lambda: archiving.s3.keys(archiving.bucket, "some/prefix/projects"),
        "the project is uploaded",
    )
    until(lambda: archiving.is_archived(archiving.older_job), "the log is archived")


def test_a_cut_log_is_restored_unchanged(archiving: ArchivingOperator) -> None:
    yaml = probe_yaml("cut", more="  limits: {log: 64Ki}\n")
    endpoint = archiving.running.deployed(yaml, {"probe.py": PROBE})
    job = archiving.running.submit(endpoint, config={"do": "say", "lines": 16_000})
    archiving.running.finished(endpoint, job)
    url = f"{endpoint}/{job['job_id']}/logs"
    before = archiving.running.http.get(url).text
    assert "of the log are gone" in before
    until(lambda: archiving.is_marked(job), "the log is archived")
    folder = archiving.folder(job)
    size = (folder / "log").stat().st_size
    key = f"some/prefix/logs/{job['job_id']}/log"
    stored = archiving.s3.client().head_object(Bucket=archiving.bucket, Key=key)
    assert stored["ContentLength"] < 128 << 10 < size
    for name in ("log", "log.cut"):
        (folder / name).unlink()
    assert archiving.running.http.get(url).text == before
    assert (folder / "log").stat().st_size == size
    end = archiving.running.http.get(url, headers={"Range": "bytes=-13"})
    assert end.text == before[-13:]


def test_local_copies_of_logs_are_removed_a_day_after_their_last_use(
    archiving: ArchivingOperator,
) -> None:
    running = archiving.running
    old, new = [running.submit(archiving.endpoint, config=SAY) for _ in range(2)]
    for job in (old, new):
        running.finished(archiving.endpoint, job)
        until(lambda job=job: archiving.is_marked(job), "the log is archived")
    two_days_ago = archiving.mark(old).stat().st_mtime - 2 * 86_400
    os.utime(archiving.mark(old), (two_days_ago, two_days_ago))
    running.kill()
    running.start()  # the removal runs at the start, and then once an hour
    log = archiving.folder(old) / "log"
    until(lambda: not log.exists(), "the copy is removed")
    assert (archiving.folder(new) / "log").exists()
    assert running.log_of(archiving.endpoint, old) == SAY_LOG
    assert log.exists()


def test_the_log_of_a_job_that_never_ran_is_archived(archiving: ArchivingOperator) -> None:
    running = archiving.running
    files = {"probe.py": PROBE, "requirements.txt": "./nothere.whl\n"}
    endpoint = running.deployed(probe_yaml("broken"), files)
    job = running.submit(endpoint)
    assert running.finished(endpoint, job)["status"] == "status_unexpected_error"
    until(lambda: archiving.is_marked(job), "the log is archived")
    words = running.log_of(endpoint, job)
    assert "nothere" in words
    shutil.rmtree(archiving.folder(job))
    assert running.log_of(endpoint, job) == words
    # A job that was stopped while waiting never had a log: its log is empty, not lost.
    big = probe_yaml("big").replace("cpu: 1m", f"cpu: {os.cpu_count()}")
    endpoint = running.deployed(big, {"probe.py": PROBE})
    first = running.submit(endpoint, config=ASLEEP)
    behind = running.submit(endpoint)
    running.delete(endpoint, behind)
    assert running.log_of(endpoint, behind) == ""
    running.delete(endpoint, first)


def test_without_the_object_store_jobs_continue_and_deploys_are_refused(
    archiving: ArchivingOperator,
) -> None:
    running, endpoint = archiving.running, archiving.endpoint
    spec = f"{running.url}/-/apis/probe"
    before = running.http.get(spec).json()[0]["spec"]
    projects = set((running.data_dir / "projects").iterdir())
    files = {"probe.py": PROBE, "more": ""}
    archiving.gate.shut()
    refusal = running.deploy(probe_yaml(), files)
    assert (refusal.status_code, refusal.json()["kind"]) == (503, "storage.unavailable")
    assert refusal.headers["Retry-After"]
    assert "does not answer" in refusal.json()["message"]
    assert running.http.get(spec).json()[0]["spec"] == before
    assert set((running.data_dir / "projects").iterdir()) == projects
    job = running.submit(endpoint, config=SAY)
    assert running.finished(endpoint, job)["status"] == "status_succeeded"
    assert running.log_of(endpoint, job) == SAY_LOG
    assert not archiving.is_archived(job)
    archiving.gate.open()
    until(lambda: archiving.is_marked(job), "the log is archived")
    assert running.deploy(probe_yaml(), files).status_code == 200
    # A log that is only in the object store is unavailable until the object store is back.
    shutil.rmtree(archiving.folder(job))
    archiving.gate.shut()
    url = f"{endpoint}/{job['job_id']}/logs"
    refusal = running.http.get(url)
    assert (refusal.status_code, refusal.json()["kind"]) == (503, "storage.unavailable")
    archiving.gate.open()
    assert running.http.get(url).text == SAY_LOG


def test_an_operator_starts_while_its_object_store_is_away(archiving: ArchivingOperator) -> None:
    running = archiving.running
    old, unsent = [running.submit(archiving.endpoint, config=SAY) for _ in range(2)]
    running.finished(archiving.endpoint, old)
    until(lambda: archiving.is_marked(old), "the log is archived")
    shutil.rmtree(archiving.folder(old))
    archiving.gate.shut()
    running.kill()
    running.start()
    endpoint = archiving.endpoint
    until(
        lambda: "cannot use the object store; deploys" in running.log.read_text(),
        "the log says what is wrong",
    )
    assert running.finished(endpoint, unsent)["status"] == "status_succeeded"
    assert running.log_of(endpoint, unsent) == SAY_LOG
    done = running.run(endpoint, config=SAY)
    assert done["status"] == "status_succeeded"
    refusals = [
        running.http.get(f"{endpoint}/{old['job_id']}/logs"),
        running.deploy(probe_yaml(), {"probe.py": PROBE, "another": ""}),
    ]
    for refusal in refusals:
        assert (refusal.status_code, refusal.json()["kind"]) == (503, "storage.unavailable")
        assert "does not answer" in refusal.json()["message"]
    archiving.gate.open()
    until(lambda: archiving.is_marked(done), "the log is archived")
    assert running.log_of(endpoint, old) == SAY_LOG
    assert running.deploy(probe_yaml(), {"probe.py": PROBE, "another": ""}).status_code == 200


def test_another_operator_leads_while_the_object_store_is_away(
    bucket: str, database: str, gate: NetworkGate, tmp_path: Path
) -> None:
    options = ("--store", database, "--files", f"s3://{bucket}/some/prefix")
    with operators(tmp_path, 2, *options) as (one, other):
        job = one.submit(deploy_probe(one), config=SAY)
        one.finished(f"{one.url}/probe", job)
        gate.shut()
        one.kill()
        one.start()
        other.kill()
        done = one.run(f"{one.url}/probe", config=SAY)
        assert done["status"] == "status_succeeded"
        assert one.log_of(f"{one.url}/probe", job) == SAY_LOG
        gate.open()
        other.start()


def test_the_first_start_with_an_object_store_needs_it(
    bucket: str, gate: NetworkGate, tmp_path: Path
) -> None:
    gate.shut()
    error = startup_error(tmp_path / "data", "--files", f"s3://{bucket}/some/prefix")
    assert "does not answer" in error


def test_an_operator_killed_before_it_archived_a_log_archives_it_later(
    archiving: ArchivingOperator,
) -> None:
    running = archiving.running
    archiving.gate.shut()
    job = running.submit(archiving.endpoint, config=SAY)
    running.finished(archiving.endpoint, job)
    asleep = running.submit(archiving.endpoint, config=ASLEEP)
    running.await_log(archiving.endpoint, asleep, "asleep")
    running.kill()
    archiving.gate.open()
    assert not archiving.is_archived(job)
    running.start()
    until(lambda: archiving.is_archived(job), "the log is archived")
    assert not archiving.is_archived(asleep)
    running.delete(archiving.endpoint, asleep)
    until(lambda: archiving.is_archived(asleep), "the log is archived")


def test_a_missing_project_is_downloaded_or_reported_as_lost(archiving: ArchivingOperator) -> None:
    running = archiving.running
    running.run(deploy_probe(running))
    project = archiving.project()
    key = f"some/prefix/projects/{project.name}/project.tar.gz"
    stored = archiving.s3.client().get_object(Bucket=archiving.bucket, Key=key)["Body"].read()
    running.kill()
    shutil.rmtree(project)
    archiving.s3.client().delete_object(Bucket=archiving.bucket, Key=key)
    running.start()
    done = running.run(archiving.endpoint)
    assert done["status"] == "status_unexpected_error"
    assert "deploy it again" in done["message"]
    archiving.s3.client().put_object(Bucket=archiving.bucket, Key=key, Body=stored)
    done = running.run(archiving.endpoint)
    assert done["status"] == "status_succeeded", done
    assert (project / "empty").is_dir()


def test_starts_wait_for_the_object_store_and_removals_are_postponed(
    tmp_path: Path, s3: S3Server, bucket: str, gate: NetworkGate
) -> None:
    options = ("--keep-logs", str(4 / 86_400), "--files", f"s3://{bucket}/some/prefix")
    with operator(tmp_path, *options) as running:
        files = {"probe.py": PROBE, "requirements.txt": "--no-index\n"}
        gate.shut_before = b".lock"  # before the operator knows whether a lockfile exists
        endpoint = running.deployed(probe_yaml(), files)
        job = running.submit(endpoint, config=SAY)
        words = "retrying until this clears: the object store"
        until(
            lambda: words in running.status(endpoint, job).get("message", ""),
            "the status names the object store",
        )
        gate.shut_before = b"?delete"
        gate.open()
        assert running.finished(endpoint, job)["status"] == "status_succeeded"
        asleep = running.submit(endpoint, config=ASLEEP)

        def is_postponed(line: str) -> bool:
            # The removal itself, not the requests before it.
            return "retention postponed" in line and "?delete" in line

        until(
            lambda: any(map(is_postponed, running.log.read_text().splitlines())),
            "the removal is postponed",
        )
        assert running.log_of(endpoint, job) == SAY_LOG
        gate.open()
        url = f"{endpoint}/{job['job_id']}/logs"
        until(lambda: running.http.get(url).status_code == 404, "the log is removed")
        until(lambda: not s3.keys(bucket, "some/prefix/logs"), "the archived log is removed")
        marks = running.data_dir / "archived"
        until(lambda: not list(marks.iterdir()), "the mark of the log is removed")
        until(lambda: len(s3.keys(bucket, "some/prefix/projects")) == 2, "the lockfile remains")
        running.delete(endpoint, asleep)
