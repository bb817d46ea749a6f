"""`cortex backup` and `cortex restore`, on real operators."""

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
from operator_harness import PROBE, Operator, operator, probe_yaml, processes_with, refused, until
from postgresql_server import PostgreSQLServer

SLEEP = {"do": "sleep", "s": 300}


def run(*words: str | Path, code: int = 0, **environment: str) -> str:
    """What the command says."""
    done = preloaded_cli.run(*map(str, words), env={**os.environ, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def backed_up(own_operator: Operator, file: Path) -> Path:
    run("backup", file, "--data-dir", own_operator.data_dir)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.glob(".cortex-backup-*")] == []
    return file


@contextmanager
def restored(file: Path, folder: Path, *options: str) -> Iterator[Operator]:
    """An operator on what was restored."""
    run("restore", file, "--data-dir", folder / "data")
    with operator(folder, *options) as running:
        yield running


def members(file: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(file) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            found[member.name] = content.read()
    return found


def written(file: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


@pytest.fixture
def backup(own_operator: Operator, tmp_path: Path) -> Path:
    """That of an operator with an API and a job that has ended."""
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    own_operator.run(endpoint, config={"do": "say", "lines": 3})
    return backed_up(own_operator, tmp_path / "backup.tar.gz")


def is_refused(file: Path, folder: Path) -> str:
    """Nothing is made; what the command says."""
    said = run("restore", file, "--data-dir", folder, code=1)
    assert not folder.exists()
    return said


def test_what_an_operator_had_is_there_again(own_operator: Operator, tmp_path: Path) -> None:
    path = own_operator.deployed(
        probe_yaml(more="  limits: {log: 64Ki}\n"), {"probe.py": PROBE, "sub/data": "A=b"}
    ).removeprefix(own_operator.url)
    done = own_operator.submit(own_operator.url + path, config={"a": [1, 2]})
    own_operator.finished(own_operator.url + path, done)
    failed = own_operator.submit(own_operator.url + path, config={"do": "fail", "message": "no"})
    own_operator.finished(own_operator.url + path, failed)
    said = own_operator.submit(
        own_operator.url + path, config={"do": "say", "lines": 10_000}
    )  # over its limit
    own_operator.finished(own_operator.url + path, said)
    (own_operator.data_dir / "locks" / "l").mkdir()
    (own_operator.data_dir / "locks" / "l" / "linux-3.11.lock").write_text("a==1\n")
    secret = run("token", "create", "t", "--scope", "read", "--data-dir", own_operator.data_dir)
    file = backed_up(own_operator, tmp_path / "backup.tar.gz")
    later = own_operator.submit(own_operator.url + path)
    own_operator.finished(own_operator.url + path, later)
    with restored(file, tmp_path / "other") as other:
        for job in (done, failed, said):
            assert other.status(other.url + path, job) == own_operator.status(
                own_operator.url + path, job
            )
            assert other.log_of(other.url + path, job) == own_operator.log_of(
                own_operator.url + path, job
            )
        assert "of the log are gone" in other.log_of(other.url + path, said)
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
    own_operator.kill()  # and without an operator
    backed_up(own_operator, file)
    with restored(file, tmp_path / "third") as third:
        assert third.status(third.url + path, later)["status"] == "status_succeeded"


def test_what_ran_is_lost_or_tried_again_and_the_original_s_goes_on(
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
    file = backed_up(own_operator, tmp_path / "backup.tar.gz")
    workers = {path: processes_with(f"CORTEX_JOB_ID={job['job_id']}") for path, job in jobs.items()}
    with restored(file, tmp_path / "other", "--cpu", "2") as other:
        told = other.finished(other.url + once, jobs[once])
        assert told["status"] == "status_unexpected_error"
        assert "restored from a backup of 20" in told["message"]
        other.await_log(other.url + again, jobs[again], "attempt 1 was lost")
        assert other.status(other.url + again, jobs[again])["status"] == "status_running"
        assert other.finished(other.url + full, waits)["status"] == "status_succeeded"
        assert not (other.data_dir / "restored").exists()
        assert other.delete(other.url + again, jobs[again]).status_code == 200
    for path, job in jobs.items():
        assert processes_with(f"CORTEX_JOB_ID={job['job_id']}") == workers[path]
        assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"


def test_a_folder_with_data_or_an_operator_is_left_alone(
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
    until(lambda: not processes_with(job["job_id"]), "the job gone")
    own_operator.kill()
    run(*data, "--force")
    own_operator.start()
    assert own_operator.http.get(f"{own_operator.url}{path}/{job['job_id']}").status_code == 404
    (aside,) = own_operator.data_dir.glob("replaced-*")
    assert (aside / "operator.db").exists()
    assert own_operator.run(own_operator.url + path)["status"] == "status_succeeded"


def test_one_that_was_cut_off_is_told_and_can_be_done_again(backup: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other" / "data"
    run("restore", backup, "--data-dir", folder)
    (folder / ".restoring").mkdir()  # as if it had been killed before the database had its place
    shutil.move(folder / "operator.db", folder / ".restoring")
    said = run("serve", "--port", "0", "--data-dir", folder, code=1)
    assert "cut off" in said
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
        said = {**json.loads(found["cortex-backup.json"]), **changed}
        return {**found, "cortex-backup.json": json.dumps(said).encode()}

    return change


def _project(name: str, link: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, link
        tar.addfile(member)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("spoil", "told"),
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
def test_an_archive_that_is_none_is_refused(
    backup: Path, tmp_path: Path, spoil: Callable[[dict[str, bytes]], dict[str, bytes]], told: str
) -> None:
    spoilt = written(tmp_path / "spoilt", spoil(members(backup)))
    assert told in is_refused(spoilt, tmp_path / "other")


def test_what_is_damaged_or_cut_off_anywhere_is_refused(backup: Path, tmp_path: Path) -> None:
    data = backup.read_bytes()
    spoilt = tmp_path / "spoilt"
    for place in (0, 1, len(data) // 4, len(data) // 2, len(data) - 9, len(data) - 1):
        spoilt.write_bytes(data[:place])
        is_refused(spoilt, tmp_path / "other")
        spoilt.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        is_refused(spoilt, tmp_path / "other")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        with tarfile.open(spoilt, "w:gz") as tar:
            member = tarfile.TarInfo("cortex-backup.json")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        assert "does not belong in a backup" in is_refused(spoilt, tmp_path / "other")
    assert "No such file" in is_refused(tmp_path / "missing", tmp_path / "other")


def _migrated(path: Path, revision: str) -> None:
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = Config()
        folder = Path(cortex.store.__file__).parent / "migrations"
        config.set_main_option("script_location", str(folder))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_a_backup_of_older_tables_is_brought_up_to_date(backup: Path, tmp_path: Path) -> None:
    old, found = tmp_path / "old.db", members(backup)
    _migrated(old, "0004")  # whose jobs have no losses
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
    with restored(written(tmp_path / "older", spoilt), tmp_path / "other") as other:
        assert other.run(f"{other.url}/probe")["status"] == "status_succeeded"


def test_a_log_that_a_job_has_made_endless_is_bounded(
    own_operator: Operator, tmp_path: Path
) -> None:
    endpoint = own_operator.deployed(probe_yaml(more="  limits: {log: 1Mi}\n"), {"probe.py": PROBE})
    job = own_operator.submit(endpoint)
    own_operator.finished(endpoint, job)
    os.truncate(own_operator.data_dir / "jobs" / job["job_id"] / "log", 1 << 40)
    file = backed_up(own_operator, tmp_path / "backup.tar.gz")
    assert 1 << 20 <= len(members(file)[f"jobs/{job['job_id']}/log"]) <= 2 << 20


def test_a_project_that_is_gone_is_told(own_operator: Operator, tmp_path: Path) -> None:
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


def test_with_a_store_of_files_the_old_folder_has_to_be_given_up(tmp_path: Path) -> None:
    files = ("--files", f"file://{tmp_path}/files")
    (tmp_path / "files").mkdir()
    with operator(tmp_path / "one", *files) as one:
        path = one.deployed(probe_yaml(), {"probe.py": PROBE}).removeprefix(one.url)
        done = one.submit(one.url + path, config={"do": "say"})
        one.finished(one.url + path, done)
        mark = one.data_dir / "archived" / done["job_id"]
        until(mark.exists, "the log archived")
        file = backed_up(one, tmp_path / "backup.tar.gz")
        assert not [name for name in members(file) if name.startswith("jobs/")]
        lost = (one.data_dir / "folder.id").read_text()
        one.kill()
        data = tmp_path / "other" / "data"
        run("restore", file, "--data-dir", data)
        assert f"--lost-folder {lost}" in refused(data, *files)
        with operator(tmp_path / "other", *files, "--lost-folder", lost) as other:
            assert other.log_of(other.url + path, done) == "line 0\n"
            assert other.run(other.url + path)["status"] == "status_succeeded"
        shutil.rmtree(tmp_path / "files")  # and what the first one had there
        (tmp_path / "files").mkdir()


def test_where_there_is_nothing_to_back_up_that_is_told(tmp_path: Path) -> None:
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
        told = one.finished(one.url + path, done)
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
            assert other.status(other.url + path, done) == told
            assert other.finished(other.url + path, job)["status"] == "status_unexpected_error"
            assert other.run(other.url + path)["status"] == "status_succeeded"
        assert one.status(one.url + path, job)["status"] == "status_running"
    third = ("restore", file, "--data-dir", tmp_path / "third", "--store", target)
    assert "has an operator's data" in run(*third, code=1)
    assert "use --store" in run("restore", file, "--data-dir", tmp_path / "third", code=1)
    run(*third, "--force")
    postgresql.drop(name)
