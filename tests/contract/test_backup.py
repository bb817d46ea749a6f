"""`cortex backup` and `cortex restore` with real operators."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

import cortex.store
import preloaded_cli
from operator_harness import (
    PROBE,
    Operator,
    operator,
    probe_yaml,
    processes_with,
    startup_error,
    until,
)
from postgresql_server import PostgreSQLServer

SLEEP = {"do": "sleep", "s": 300}


def run(*words: str | Path, code: int = 0, **environment: str) -> str:
    """The output of the command."""
    done = preloaded_cli.run(*map(str, words), env={**os.environ, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def back_up(own_operator: Operator, file: Path) -> Path:
    run("backup", file, "--data-dir", own_operator.data_dir)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.glob(".cortex-backup-*")] == []
    return file


@contextmanager
def restored_operator(file: Path, folder: Path, *options: str) -> Iterator[Operator]:
    """An operator on a restored data folder."""
    run("restore", file, "--data-dir", folder / "data")
    with operator(folder, *options) as running:
        yield running


def archive_members(file: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(file) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            found[member.name] = content.read()
    return found


def write_archive(file: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


@pytest.fixture
def backup(own_operator: Operator, tmp_path: Path) -> Path:
    """The backup of an operator with an API and a finished job."""
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    own_operator.run(endpoint, config={"do": "say", "lines": 3})
    return back_up(own_operator, tmp_path / "backup.tar.gz")


def refused_restore(file: Path, folder: Path) -> str:
    """The output of a restore that must fail and make nothing."""
    output = run("restore", file, "--data-dir", folder, code=1)
    assert not folder.exists()
    return output


def test_a_restore_brings_back_all_data_of_an_operator(
    own_operator: Operator, tmp_path: Path
) -> None:
    path = own_operator.deployed(
        probe_yaml(more="  limits: {log: 64Ki}\n"), {"probe.py": PROBE, "sub/data": "A=b"}
    ).removeprefix(own_operator.url)
    done = own_operator.submit(own_operator.url + path, config={"a": [1, 2]})
    own_operator.finished(own_operator.url + path, done)
    failed = own_operator.submit(own_operator.url + path, config={"do": "fail", "message": "no"})
    own_operator.finished(own_operator.url + path, failed)
    config = {"do": "say", "lines": 10_000}  # exceeds the limit of the log
    chatty = own_operator.submit(own_operator.url + path, config=config)
    own_operator.finished(own_operator.url + path, chatty)
    (own_operator.data_dir / "locks" / "l").mkdir()
    (own_operator.data_dir / "locks" / "l" / "linux-3.11.lock").write_text("a==1\n")
    secret = run("token", "create", "t", "--scope", "read", "--data-dir", own_operator.data_dir)
    file = back_up(own_operator, tmp_path / "backup.tar.gz")
    later = own_operator.submit(own_operator.url + path)
    own_operator.finished(own_operator.url + path, later)
    with restored_operator(file, tmp_path / "other") as other:
        for job in (done, failed, chatty):
            assert other.status(other.url + path, job) == own_operator.status(
                own_operator.url + path, job
            )
            assert other.log_of(other.url + path, job) == own_operator.log_of(
                own_operator.url + path, job
            )
        assert "of the log are gone" in other.log_of(other.url + path, chatty)
        assert other.http.get(f"{other.url}{path}/{later['job_id']}").status_code == 404
        assert other.run(other.url + path, config={"b": 1})["status"] == "status_succeeded"
        listed = json.loads(run("token", "list", "-o", "json", "--data-dir", other.data_dir))
        assert [token["name"] for token in listed] == ["t"]
        (folder,) = (other.data_dir / "projects").iterdir()
        assert (folder / "sub" / "data").read_text() == "A=b"
        assert (other.data_dir / "operator.db").stat().st_mode & 0o777 == 0o600
        assert (other.data_dir / "folder.id").read_text() != (
            own_operator.data_dir / "folder.id"
        ).read_text()
    assert secret.strip()
    own_operator.kill()  # a backup also works without an operator
    back_up(own_operator, file)
    with restored_operator(file, tmp_path / "third") as third:
        assert third.status(third.url + path, later)["status"] == "status_succeeded"


def test_restored_running_jobs_are_lost_or_retried_and_the_originals_continue(
    own_operator: Operator, tmp_path: Path
) -> None:
    once = own_operator.deployed(probe_yaml("once"), {"probe.py": PROBE}).removeprefix(
        own_operator.url
    )
    again = own_operator.deployed(probe_yaml("again", more="  retries: 1\n"), {"probe.py": PROBE})
    again = again.removeprefix(own_operator.url)
    full = own_operator.deployed(probe_yaml("full").replace("1m", '"1"'), {"probe.py": PROBE})
    full = full.removeprefix(own_operator.url)
    jobs = {
        path: own_operator.submit(own_operator.url + path, config=SLEEP) for path in (once, again)
    }
    for path, job in jobs.items():
        own_operator.await_log(own_operator.url + path, job, "asleep")
    waits = own_operator.submit(own_operator.url + full)
    file = back_up(own_operator, tmp_path / "backup.tar.gz")
    workers = {path: processes_with(f"CORTEX_JOB_ID={job['job_id']}") for path, job in jobs.items()}
    with restored_operator(file, tmp_path / "other", "--cpu", "2") as other:
        ended = other.finished(other.url + once, jobs[once])
        assert ended["status"] == "status_unexpected_error"
        assert "restored from a backup of 20" in ended["message"]
        other.await_log(other.url + again, jobs[again], "attempt 1 was lost")
        assert other.status(other.url + again, jobs[again])["status"] == "status_running"
        assert other.finished(other.url + full, waits)["status"] == "status_succeeded"
        assert not (other.data_dir / "restored").exists()
        assert other.delete(other.url + again, jobs[again]).status_code == 200
    for path, job in jobs.items():
        assert processes_with(f"CORTEX_JOB_ID={job['job_id']}") == workers[path]
        assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"


def test_a_restore_overwrites_no_data_and_no_running_operator(
    own_operator: Operator, backup: Path, tmp_path: Path
) -> None:
    data = ("restore", backup, "--data-dir", own_operator.data_dir)
    assert "in use by another operator" in run(*data, "--force", code=1)
    path = f"/{own_operator.http.get(own_operator.url + '/-/apis').json()[0]['spec']['name']}"
    job = own_operator.submit(own_operator.url + path, config=SLEEP)
    own_operator.await_log(own_operator.url + path, job, "asleep")
    assert own_operator.stop() == 0
    assert "--force" in run(*data, code=1)
    assert "still run" in run(*data, "--force", code=1)
    own_operator.start()
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"
    own_operator.delete(own_operator.url + path, job)
    until(lambda: not processes_with(job["job_id"]), "the job's processes have exited")
    own_operator.kill()
    run(*data, "--force")
    own_operator.start()
    assert own_operator.http.get(f"{own_operator.url}{path}/{job['job_id']}").status_code == 404
    (aside,) = own_operator.data_dir.glob("replaced-*")
    assert (aside / "operator.db").exists()
    assert own_operator.run(own_operator.url + path)["status"] == "status_succeeded"


def test_an_interrupted_restore_is_reported_and_can_be_repeated(
    backup: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other" / "data"
    run("restore", backup, "--data-dir", folder)
    (folder / ".restoring").mkdir()  # as after a SIGKILL before the restore moved the database
    shutil.move(folder / "operator.db", folder / ".restoring")
    output = run("serve", "--port", "0", "--data-dir", folder, code=1)
    assert "cut off" in output
    run("restore", backup, "--data-dir", folder)
    with operator(tmp_path / "other") as other:
        assert other.run(f"{other.url}/probe")["status"] == "status_succeeded"


def _without(name: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda found: {each: data for each, data in found.items() if each != name}


def _with(**more: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def add(found: dict[str, bytes]) -> dict[str, bytes]:
        end = found.pop("cortex-backup.end")
        named = {name.replace("__", "/").replace("_DOT_", "."): data for name, data in more.items()}
        return {**found, **named, "cortex-backup.end": end}

    return add


def _manifest(**changed: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def change(found: dict[str, bytes]) -> dict[str, bytes]:
        manifest = {**json.loads(found["cortex-backup.json"]), **changed}
        return {**found, "cortex-backup.json": json.dumps(manifest).encode()}

    return change


def _project(name: str, link: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, link
        tar.addfile(member)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("cortex-backup.json"), "not a backup"),
        (_without("operator.db"), "no database"),
        (_without("cortex-backup.end"), "not complete"),
        (_with(**{".._DOT___DOT___evil": b""}), "does not belong in a backup"),
        (_with(jobs__x__files=b""), "does not belong in a backup"),
        (_with(jobs__x__log=b""), "not in its database"),
        (_with(**{"jobs__x__log_DOT_cut": b'{"start": 1, "end": 0, "limit": 1}'}), "cannot be read"),
        (_with(**{"projects__p_DOT_tar_DOT_gz": b"no archive"}), "archive"),
        (_with(**{"projects__p_DOT_tar_DOT_gz": _project("a", "/etc/passwd")}), "link"),
        (_manifest(format=2), "of format 2"),
        (_manifest(revision="9999"), "newer version"),
        (_manifest(store="postgresql"), "PostgreSQL; use --store"),
        (_manifest(store="x"), "not a backup"),
        (_manifest(created=1), "not a backup"),
        (lambda found: {**found, "operator.db": b"no database" * 1000}, "the database in it cannot be read"),
        (lambda found: {**found, "operator.db": found["operator.db"][:8192]}, "database"),
        (lambda found: {"hello": b"x"}, "not a backup"),
    ],
)  # fmt: skip
def test_an_archive_that_is_no_backup_is_refused(
    backup: Path,
    tmp_path: Path,
    spoil: Callable[[dict[str, bytes]], dict[str, bytes]],
    message: str,
) -> None:
    spoilt = write_archive(tmp_path / "spoilt", spoil(archive_members(backup)))
    assert message in refused_restore(spoilt, tmp_path / "other")


def test_a_damaged_or_truncated_backup_is_refused(backup: Path, tmp_path: Path) -> None:
    data = backup.read_bytes()
    spoilt = tmp_path / "spoilt"
    for offset in (0, 1, len(data) // 4, len(data) // 2, len(data) - 9, len(data) - 1):
        spoilt.write_bytes(data[:offset])
        refused_restore(spoilt, tmp_path / "other")
        spoilt.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        refused_restore(spoilt, tmp_path / "other")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        with tarfile.open(spoilt, "w:gz") as tar:
            member = tarfile.TarInfo("cortex-backup.json")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        assert "does not belong in a backup" in refused_restore(spoilt, tmp_path / "other")
    assert "No such file" in refused_restore(tmp_path / "missing", tmp_path / "other")


def _migrated(path: Path, revision: str) -> None:
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = Config()
        folder = Path(cortex.store.__file__).parent / "migrations"
        config.set_main_option("script_location", str(folder))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_a_backup_with_an_older_schema_is_migrated(backup: Path, tmp_path: Path) -> None:
    old, found = tmp_path / "old.db", archive_members(backup)
    _migrated(old, "0004")  # where jobs have no column `losses`
    (tmp_path / "new.db").write_bytes(found["operator.db"])
    with closing(sqlite3.connect(old, isolation_level=None)) as database:
        database.execute("ATTACH ? AS new", (str(tmp_path / "new.db"),))
        for table in ("versions", "apis", "jobs"):
            columns = ", ".join(
                row[1] for row in database.execute(f"PRAGMA main.table_info({table})")
            )
            assert "losses" not in columns
            database.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM new.{table}")
    spoilt = _manifest(revision="0004")({**found, "operator.db": old.read_bytes()})
    with restored_operator(write_archive(tmp_path / "older", spoilt), tmp_path / "other") as other:
        assert other.run(f"{other.url}/probe")["status"] == "status_succeeded"


def test_a_huge_sparse_log_is_bounded_in_a_backup(own_operator: Operator, tmp_path: Path) -> None:
    endpoint = own_operator.deployed(probe_yaml(more="  limits: {log: 1Mi}\n"), {"probe.py": PROBE})
    job = own_operator.submit(endpoint)
    own_operator.finished(endpoint, job)
    os.truncate(own_operator.data_dir / "jobs" / job["job_id"] / "log", 1 << 40)
    file = back_up(own_operator, tmp_path / "backup.tar.gz")
    assert 1 << 20 <= len(archive_members(file)[f"jobs/{job['job_id']}/log"]) <= 2 << 20


def test_a_changed_or_missing_project_is_reported(own_operator: Operator, tmp_path: Path) -> None:
    own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    (project,) = (own_operator.data_dir / "projects").iterdir()
    (project / "probe.py").write_text("changed")
    file = tmp_path / "backup.tar.gz"
    assert f"{project.name} was changed" in run("backup", file, "--data-dir", own_operator.data_dir)
    assert f"{project.name} was changed" in run("restore", file, "--data-dir", tmp_path / "other")
    assert (tmp_path / "other" / "projects" / project.name / "probe.py").read_text() == "changed"
    shutil.rmtree(project)
    assert f"{project.name} is deployed but missing from the data folder" in run(
        "backup", file, "--data-dir", own_operator.data_dir
    )


def test_with_an_object_store_the_old_folder_must_be_declared_lost(tmp_path: Path) -> None:
    files = ("--files", f"file://{tmp_path}/files")
    (tmp_path / "files").mkdir()
    with operator(tmp_path / "one", *files) as one:
        path = one.deployed(probe_yaml(), {"probe.py": PROBE}).removeprefix(one.url)
        done = one.submit(one.url + path, config={"do": "say"})
        one.finished(one.url + path, done)
        mark = one.data_dir / "archived" / done["job_id"]
        until(mark.exists, "the log is archived")
        file = back_up(one, tmp_path / "backup.tar.gz")
        assert not [name for name in archive_members(file) if name.startswith("jobs/")]
        lost_folder = (one.data_dir / "folder.id").read_text()
        one.kill()
        data = tmp_path / "other" / "data"
        run("restore", file, "--data-dir", data)
        assert f"--lost-folder {lost_folder}" in startup_error(data, *files)
        with operator(tmp_path / "other", *files, "--lost-folder", lost_folder) as other:
            assert other.log_of(other.url + path, done) == "line 0\n"
            assert other.run(other.url + path)["status"] == "status_succeeded"
        shutil.rmtree(tmp_path / "files")  # the archived files of the first operator as well
        (tmp_path / "files").mkdir()


def test_a_backup_without_a_valid_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "backup.tar.gz"
    assert "there is no database" in run("backup", file, "--data-dir", tmp_path / "x", code=1)
    assert not file.exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "operator.db").write_bytes(b"no database" * 1000)
    run("backup", file, "--data-dir", tmp_path / "data", code=1)
    assert list(tmp_path.glob("*backup*")) == []


def test_postgresql_is_backed_up_by_its_own_programs(
    postgresql: PostgreSQLServer, database: str, tmp_path: Path
) -> None:
    file, other_data = tmp_path / "backup.tar.gz", tmp_path / "other" / "data"
    name = postgresql.create()
    target = postgresql.url(name)
    with operator(tmp_path / "one", "--store", database) as one:
        path = one.deployed(probe_yaml(), {"probe.py": PROBE}).removeprefix(one.url)
        done = one.submit(one.url + path, config={"a": 1})
        ended = one.finished(one.url + path, done)
        job = one.submit(one.url + path, config=SLEEP)
        one.await_log(one.url + path, job, "asleep")
        of_one = ("--data-dir", one.data_dir, "--store", database)
        nothing = tmp_path / "nothing"
        nothing.mkdir()
        assert "pg_dump is not installed" in run("backup", file, *of_one, code=1, PATH=str(nothing))
        assert not file.exists()
        run("backup", file, *of_one)
        assert "an operator uses the database" in run(
            "restore", file, "--data-dir", other_data, "--store", database, "--force", code=1
        )
        assert not other_data.exists()
        run("restore", file, "--data-dir", other_data, "--store", target)
        with operator(tmp_path / "other", "--store", target) as other:
            assert other.status(other.url + path, done) == ended
            assert other.finished(other.url + path, job)["status"] == "status_unexpected_error"
            assert other.run(other.url + path)["status"] == "status_succeeded"
        assert one.status(one.url + path, job)["status"] == "status_running"
    third = ("restore", file, "--data-dir", tmp_path / "third", "--store", target)
    assert "has an operator's data" in run(*third, code=1)
    assert "use --store" in run("restore", file, "--data-dir", tmp_path / "third", code=1)
    run(*third, "--force")
    postgresql.drop(name)
