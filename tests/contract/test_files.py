"""An operator whose files are on a real S3 server: what it keeps there, what it has after its machine was
lost, and what happens while that server is away."""

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
    refused,
    until,
)
from postgresql_server import PostgreSQLServer
from s3_server import S3Server

pytestmark = pytest.mark.xdist_group("s3")  # whose server is slow to start
SAY = {"do": "say", "lines": 3}
SAID = "line 0\nline 1\nline 2\n"
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
def way(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[NetworkGate]:
    """The way of an operator of the test's own to the server."""
    with network_gate(s3.port) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.url)
        yield made


@dataclass
class Kept:
    """An operator with a store of files, that several tests use, and whose way there they may shut."""

    running: Operator
    s3: S3Server
    bucket: str
    way: NetworkGate
    before: Any
    """A job that had ended before there was a store of files."""

    @property
    def endpoint(self) -> str:
        return f"{self.running.url}/probe"

    def project(self) -> Path:
        """Where the files of the API's current version are."""
        found = self.running.http.get(f"{self.running.url}/-/apis/probe").json()[0]
        return self.running.data_dir / "projects" / str(found["spec"]["project_id"])

    def archived(self, job: Any) -> bool:
        return archived(self.s3, self.bucket, job)

    def is_marked(self, job: Any) -> bool:
        return self.mark(job).exists()

    def mark(self, job: Any) -> Path:
        return self.running.data_dir / "archived" / str(job["job_id"])

    def folder(self, job: Any) -> Path:
        return self.running.data_dir / "jobs" / str(job["job_id"])


@pytest.fixture(scope="module")
def kept(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    bucket = s3.bucket()
    with network_gate(s3.port) as way, operator(tmp_path_factory.mktemp("kept")) as running:
        job = running.submit(deploy_probe(running), config=SAY)
        running.finished(f"{running.url}/probe", job)
        running.kill()
        running.options += ("--files", f"s3://{bucket}/some/prefix")
        running.environment["AWS_ENDPOINT_URL_S3"] = way.url
        running.start()
        yield Kept(running, s3, bucket, way, job)


@dataclass
class Moved:
    """Two data folders on one database and bucket: the second one took the place of the first."""

    first: Operator
    lost: str
    second: Operator
    options: list[str]
    bucket: str
    spec: Any
    over: Any
    told: Any
    running: list[Any]


@pytest.fixture(scope="module")
def moved(
    s3: S3Server,
    postgresql: PostgreSQLServer,
    migrated_database: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Moved]:
    database, bucket = postgresql.create(template=migrated_database), s3.bucket()
    options = ["--store", postgresql.url(database), "--files", f"s3://{bucket}/some/prefix"]
    folder = tmp_path_factory.mktemp("moved")
    (folder / "first").mkdir()
    first = Operator(folder / "first", "--grace", "1", *options)
    first.start()
    try:
        endpoint = deploy_probe(first)
        over = first.submit(endpoint, config=SAY)
        told = first.finished(endpoint, over)
        jobs = [first.submit(endpoint, config=each) for each in (ASLEEP, {"do": "stubborn"})]
        for job in jobs:
            first.await_log(endpoint, job, "asleep")
        until(lambda: archived(s3, bucket, over), "the log is archived")
        spec = first.http.get(f"{first.url}/-/apis").json()[0]["spec"]
        first.kill()
        lost = (first.data_dir / "folder.id").read_text()
        with operator(folder / "second", *options, "--lost-folder", lost) as second:
            yield Moved(first, lost, second, options, bucket, spec, over, told, jobs)
    finally:
        first.kill()
        first.http.close()
        for pid in processes_with(str(first.data_dir)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not processes_with(str(first.data_dir)), "all processes gone")
    postgresql.drop(database)


def deploy_probe(running: Operator) -> str:
    return running.deployed(probe_yaml(), {"probe.py": PROBE, "empty/.keep": ""})


def archived(s3: S3Server, bucket: str, job: Any) -> bool:
    return f"some/prefix/logs/{job['job_id']}/log" in s3.keys(bucket)


def test_what_is_kept_there_outlives_the_machine(moved: Moved) -> None:
    second, job = moved.second, moved.over
    endpoint = f"{second.url}/probe"
    assert second.http.get(f"{second.url}/-/apis").json()[0]["spec"] == moved.spec
    assert second.status(endpoint, job) == moved.told
    assert second.log_of(endpoint, job) == SAID
    url = f"{endpoint}/{job['job_id']}/logs"
    part = second.http.get(url, headers={"Range": "bytes=7-12"})
    assert (part.status_code, part.text) == (206, "line 1")
    events = second.http.get(url, headers={"Accept": "text/event-stream"}).text
    assert "line 2" in events
    assert "event: end" in events
    assert second.run(endpoint, config={"x": 1})["status"] == "status_succeeded"


def test_jobs_of_a_folder_that_is_named_as_lost_end_and_no_others(moved: Moved) -> None:
    second = moved.second
    endpoint = f"{second.url}/probe"
    for job in moved.running:
        found = second.finished(endpoint, job)
        assert found["status"] == "status_unexpected_error"
        assert f"was lost, with the data folder {moved.lost}" in found["message"]
        gone = second.http.get(f"{endpoint}/{job['job_id']}/logs")
        assert (gone.status_code, gone.json()["kind"]) == (404, "not_found")
        assert "lost before the log was sent" in gone.json()["message"]
    # A job of this folder is not given up, though the setting stays.
    mine = second.submit(endpoint, config=ASLEEP)
    second.await_log(endpoint, mine, "asleep")
    second.kill()
    second.start()
    endpoint = f"{second.url}/probe"
    assert second.status(endpoint, mine)["status"] == "status_running"
    second.delete(endpoint, mine)
    second.finished(endpoint, mine)


def test_a_folder_that_may_still_run_jobs_is_given_up_only_when_it_is_named(
    moved: Moved, tmp_path: Path
) -> None:
    identity = (moved.second.data_dir / "folder.id").read_text()
    assert f"--lost-folder {identity}" in refused(tmp_path / "third", *moved.options)
    # Its operator is there, so it is not lost.
    told = refused(tmp_path / "third", *moved.options, "--lost-folder", identity)
    assert f"{identity} is not lost: the operator at {moved.second.url} uses it" in told
    # Not its database, but its files: they are another's.
    told = refused(tmp_path / "fourth", *moved.options[2:])
    assert f"belongs with another data folder, {identity}" in told
    # The first one is not dead after all, and is kept out.
    told = refused(moved.first.data_dir, *moved.options)
    assert "belongs to another data folder" in told


def test_a_log_that_one_operator_archived_any_other_has(
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
            assert each.log_of(f"{each.url}/probe", job) == SAID


def test_a_store_of_files_that_is_wrong_from_the_beginning_is_told(tmp_path: Path) -> None:
    assert "no bucket 'nothere'. Create it" in refused(tmp_path, "--files", "s3://nothere/x")


def test_what_was_there_before_there_was_a_store_of_files_is_sent_to_it(kept: Kept) -> None:
    until(lambda: kept.s3.keys(kept.bucket, "some/prefix/projects"), "the project is sent")
    until(lambda: kept.archived(kept.before), "the log is archived")


def test_a_log_that_lost_its_middle_is_brought_back_as_it_was(kept: Kept) -> None:
    yaml = probe_yaml("cut", more="  limits: {log: 64Ki}\n")
    endpoint = kept.running.deployed(yaml, {"probe.py": PROBE})
    job = kept.running.submit(endpoint, config={"do": "say", "lines": 16_000})
    kept.running.finished(endpoint, job)
    url = f"{endpoint}/{job['job_id']}/logs"
    before = kept.running.http.get(url).text
    assert "of the log are gone" in before
    until(lambda: kept.is_marked(job), "the log is archived")
    folder = kept.folder(job)
    size = (folder / "log").stat().st_size
    key = f"some/prefix/logs/{job['job_id']}/log"
    stored = kept.s3.client().head_object(Bucket=kept.bucket, Key=key)
    assert stored["ContentLength"] < 128 << 10 < size
    for name in ("log", "log.cut"):
        (folder / name).unlink()
    assert kept.running.http.get(url).text == before
    assert (folder / "log").stat().st_size == size
    end = kept.running.http.get(url, headers={"Range": "bytes=-13"})
    assert end.text == before[-13:]


def test_copies_here_are_dropped_a_day_after_they_were_asked_for(kept: Kept) -> None:
    running = kept.running
    old, new = [running.submit(kept.endpoint, config=SAY) for _ in range(2)]
    for job in (old, new):
        running.finished(kept.endpoint, job)
        until(lambda job=job: kept.is_marked(job), "the log is archived")
    two_days_ago = kept.mark(old).stat().st_mtime - 2 * 86_400
    os.utime(kept.mark(old), (two_days_ago, two_days_ago))
    running.kill()
    running.start()  # it looks at its start, and then once an hour
    log = kept.folder(old) / "log"
    until(lambda: not log.exists(), "the copy is dropped")
    assert (kept.folder(new) / "log").exists()
    assert running.log_of(kept.endpoint, old) == SAID
    assert log.exists()


def test_a_job_that_never_ran_has_its_words_archived(kept: Kept) -> None:
    running = kept.running
    files = {"probe.py": PROBE, "requirements.txt": "./nothere.whl\n"}
    endpoint = running.deployed(probe_yaml("broken"), files)
    job = running.submit(endpoint)
    assert running.finished(endpoint, job)["status"] == "status_unexpected_error"
    until(lambda: kept.is_marked(job), "the log is archived")
    words = running.log_of(endpoint, job)
    assert "nothere" in words
    shutil.rmtree(kept.folder(job))
    assert running.log_of(endpoint, job) == words
    # One that was stopped while it waited never had a log, and that is no loss.
    big = probe_yaml("big").replace("cpu: 1m", f"cpu: {os.cpu_count()}")
    endpoint = running.deployed(big, {"probe.py": PROBE})
    first = running.submit(endpoint, config=ASLEEP)
    behind = running.submit(endpoint)
    running.delete(endpoint, behind)
    assert running.log_of(endpoint, behind) == ""
    running.delete(endpoint, first)


def test_while_the_store_of_files_is_away_jobs_go_on_and_deploys_are_refused_whole(
    kept: Kept,
) -> None:
    running, endpoint = kept.running, kept.endpoint
    spec = f"{running.url}/-/apis/probe"
    before = running.http.get(spec).json()[0]["spec"]
    projects = set((running.data_dir / "projects").iterdir())
    files = {"probe.py": PROBE, "more": ""}
    kept.way.shut()
    refusal = running.deploy(probe_yaml(), files)
    assert (refusal.status_code, refusal.json()["kind"]) == (503, "storage.unavailable")
    assert refusal.headers["Retry-After"]
    assert "does not answer" in refusal.json()["message"]
    assert running.http.get(spec).json()[0]["spec"] == before
    assert set((running.data_dir / "projects").iterdir()) == projects
    job = running.submit(endpoint, config=SAY)
    assert running.finished(endpoint, job)["status"] == "status_succeeded"
    assert running.log_of(endpoint, job) == SAID
    assert not kept.archived(job)
    kept.way.open()
    until(lambda: kept.is_marked(job), "the log is archived")
    assert running.deploy(probe_yaml(), files).status_code == 200
    # A log that is there alone cannot be had while it is away, and can after it.
    shutil.rmtree(kept.folder(job))
    kept.way.shut()
    url = f"{endpoint}/{job['job_id']}/logs"
    refusal = running.http.get(url)
    assert (refusal.status_code, refusal.json()["kind"]) == (503, "storage.unavailable")
    kept.way.open()
    assert running.http.get(url).text == SAID


def test_an_operator_killed_before_a_log_was_archived_archives_it_when_it_is_back(
    kept: Kept,
) -> None:
    running = kept.running
    kept.way.shut()
    job = running.submit(kept.endpoint, config=SAY)
    running.finished(kept.endpoint, job)
    asleep = running.submit(kept.endpoint, config=ASLEEP)
    running.await_log(kept.endpoint, asleep, "asleep")
    running.kill()
    kept.way.open()
    assert not kept.archived(job)
    running.start()
    until(lambda: kept.archived(job), "the log is archived")
    assert not kept.archived(asleep)
    running.delete(kept.endpoint, asleep)
    until(lambda: kept.archived(asleep), "the log is archived")


def test_a_project_that_is_not_here_is_fetched_and_one_that_is_gone_is_told(kept: Kept) -> None:
    running = kept.running
    running.run(deploy_probe(running))
    project = kept.project()
    key = f"some/prefix/projects/{project.name}/project.tar.gz"
    stored = kept.s3.client().get_object(Bucket=kept.bucket, Key=key)["Body"].read()
    running.kill()
    shutil.rmtree(project)
    kept.s3.client().delete_object(Bucket=kept.bucket, Key=key)
    running.start()
    done = running.run(kept.endpoint)
    assert done["status"] == "status_unexpected_error"
    assert "deploy it again" in done["message"]
    kept.s3.client().put_object(Bucket=kept.bucket, Key=key, Body=stored)
    done = running.run(kept.endpoint)
    assert done["status"] == "status_succeeded", done
    assert (project / "empty").is_dir()


def test_what_is_needed_from_there_is_waited_for_and_what_is_to_be_removed_goes_later(
    tmp_path: Path, s3: S3Server, bucket: str, way: NetworkGate
) -> None:
    options = ("--keep-logs", str(4 / 86_400), "--files", f"s3://{bucket}/some/prefix")
    with operator(tmp_path, *options) as running:
        files = {"probe.py": PROBE, "requirements.txt": "--no-index\n"}
        way.shuts_at = b".lock"  # before it can be told whether there is one
        endpoint = running.deployed(probe_yaml(), files)
        job = running.submit(endpoint, config=SAY)
        words = "retrying until this clears: the object store"
        until(lambda: words in running.status(endpoint, job).get("message", ""), "it says why")
        way.shuts_at = b"?delete"  # whenever that is
        way.open()
        assert running.finished(endpoint, job)["status"] == "status_succeeded"
        asleep = running.submit(endpoint, config=ASLEEP)

        def waits(line: str) -> bool:
            # With the removal, not with what it does before.
            return "retention postponed" in line and "?delete" in line

        until(lambda: any(map(waits, running.log.read_text().splitlines())), "it waits")
        assert running.log_of(endpoint, job) == SAID
        way.open()
        url = f"{endpoint}/{job['job_id']}/logs"
        until(lambda: running.http.get(url).status_code == 404, "the log is removed")
        until(lambda: not s3.keys(bucket, "some/prefix/logs"), "the archived log is removed")
        marks = running.data_dir / "archived"
        until(lambda: not list(marks.iterdir()), "its mark is removed")
        until(lambda: len(s3.keys(bucket, "some/prefix/projects")) == 2, "the lock is kept")
        running.delete(endpoint, asleep)
