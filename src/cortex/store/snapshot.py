"""Copies of a whole database: taking, reading and restoring one. Called by backup and restore.

They open no `Store`, which would upgrade the schema: the database of an older version stays as it
is. SQLite itself copies a file; `pg_dump` and `pg_restore` copy a PostgreSQL database. Operators
can write while a copy is taken.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, bindparam, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from cortex.errors import StartupError
from cortex.spec.api import Limits
from cortex.spec.lifecycle import IN_PROGRESS
from cortex.store import sqlite
from cortex.store.database import connect, error_text, unusable
from cortex.store.schema import REVISION
from cortex.store.url import shown

_OPERATORS = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE application_name LIKE 'cortex %' AND datname = current_database()"
)


@dataclass(frozen=True)
class Snapshot:
    """Which files outside the database belong to it, according to the database."""

    revision: str
    """The revision of its tables."""
    projects: dict[str, bool]
    """Whether an API or a job in progress needs a project, by project id."""
    logs: dict[str, int]
    """The maximum bytes of a job's log, by job id."""


def create(url: str, target: Path) -> Snapshot:
    """Copy a database into a new file.

    Raises:
        StartupError: the database is missing, is not an operator's, or cannot be read.
    """
    if _is_file(url):
        _copy_file(_path(url), target)
        return read(target)
    with (
        _connected(url) as engine,
        engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection,
    ):
        _check_is_operators(connection, shown(engine.url))
        name = connection.execute(text("SELECT pg_export_snapshot()")).scalar_one()
        options = ["--format=custom", "--no-owner", "--no-privileges"]
        _run("pg_dump", engine.url, *options, f"--snapshot={name}", f"--file={target}")
        return _read(connection)


def read(path: Path) -> Snapshot:
    """Read and check the copy of an SQLite database, which may come from an untrusted source.

    Raises:
        StartupError: the file is damaged, no operator's database, or made by a newer version.
    """
    engine = create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True),
    )
    try:
        with engine.connect() as connection:
            damage = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
            if damage != "ok":
                raise StartupError(f"the database is damaged: {damage}")
            _check_is_operators(connection, str(path))
            found = _read(connection)
    except (SQLAlchemyError, ValueError, KeyError, TypeError) as error:
        reason = error_text(error) if isinstance(error, DBAPIError) else repr(error)
        raise StartupError(f"the database in it cannot be read: {reason}") from error
    finally:
        engine.dispose()
    check_revision(found.revision)
    return found


def check_revision(revision: str) -> None:
    """Check that this version can use tables of this revision.

    Raises:
        StartupError: a newer version made them.
    """
    if not revision.isdigit() or revision > REVISION:
        raise StartupError(
            f"a newer version made it: its tables have revision {revision!r}, those of this "
            f"version {REVISION!r}. Restore it with the version that made it."
        )


def check_is_free(url: str) -> None:
    """Check that a PostgreSQL database has no operator's data.

    Raises:
        StartupError: it has, or the database does not answer.
    """
    with _connected(url) as engine, engine.connect() as connection:
        if inspect(connection).has_table("alembic_version"):
            raise StartupError(
                f"the database {shown(engine.url)} has an operator's data: name an empty one with "
                "--store, or add --force to replace the data"
            )


def check_is_unused(url: str) -> None:
    """Check that no operator is connected to a PostgreSQL database.

    Raises:
        StartupError: one is, or the database does not answer.
    """
    with _connected(url) as engine, engine.connect() as connection:
        if connection.execute(text(_OPERATORS)).scalar_one():
            raise StartupError(
                f"an operator uses the database {shown(engine.url)}: stop the operator first"
            )


def restore(url: str, source: Path) -> None:
    """Replace the content of a PostgreSQL database by a snapshot, in one transaction.

    The table of operators is emptied, for the operators of the snapshot's database may still run on
    that database.

    Raises:
        StartupError: the snapshot cannot be restored, and why.
    """
    with _connected(url) as engine:
        options = [
            "--no-owner",
            "--no-privileges",
            "--single-transaction",
            "--clean",
            "--if-exists",
        ]
        _run("pg_restore", engine.url, *options, str(source))
        with engine.begin() as connection:
            if inspect(connection).has_table("operators"):
                connection.execute(text("DELETE FROM operators"))


@contextmanager
def _connected(url: str) -> Iterator[Engine]:
    """An engine for a PostgreSQL database.

    Raises:
        StartupError: the database cannot be used, and why.
    """
    engine = connect(url)
    try:
        yield engine
    except DBAPIError as error:
        raise unusable(engine, error) from error
    finally:
        engine.dispose()


def _is_file(url: str) -> bool:
    return url.startswith("sqlite:")


def _path(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def _copy_file(path: Path, target: Path) -> None:
    if not path.is_file():
        raise StartupError(
            f"there is no database {path}; name the data folder with --data-dir, or the database "
            "with --store"
        )
    try:
        with closing(sqlite.opened(path)) as source:
            sqlite.copy(source, target)
    except sqlite3.Error as error:
        raise StartupError(f"the database {path} cannot be copied: {error}") from error


def _check_is_operators(connection: Connection, name: str) -> None:
    if not inspect(connection).has_table("alembic_version"):
        raise StartupError(f"{name} is not an operator's database")


def _read(connection: Connection) -> Snapshot:
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    specs = {
        api_id: json.loads(spec)
        for api_id, spec in connection.execute(text("SELECT api_id, spec FROM versions"))
    }
    used = text("SELECT api_id FROM apis UNION SELECT api_id FROM jobs WHERE state IN :states")
    used = used.bindparams(
        bindparam("states", [str(state) for state in IN_PROGRESS], expanding=True)
    )
    needed = {specs[api_id]["project_id"] for api_id in connection.execute(used).scalars()}
    limits = {
        api_id: int(spec.get("limits", {}).get("log", Limits().log))
        for api_id, spec in specs.items()
    }
    return Snapshot(
        revision=str(revision),
        projects={spec["project_id"]: spec["project_id"] in needed for spec in specs.values()},
        logs={
            job_id: limits[api_id]
            for job_id, api_id in connection.execute(text("SELECT job_id, api_id FROM jobs"))
        },
    )


def _run(program: str, url: URL, *arguments: str) -> None:
    """Run one of PostgreSQL's own programs on a database.

    The password goes into the environment: every user of the machine can read the arguments.

    Raises:
        StartupError: the program is not installed, or failed, and what it printed.
    """
    secrets = {"PGPASSWORD": str(url.password)} if url.password is not None else {}
    if "password" in url.query:
        secrets["PGPASSWORD"] = str(url.query["password"])
    plain = url.difference_update_query(["password"]).set(drivername="postgresql", password=None)
    database = plain.render_as_string(hide_password=False)
    try:
        done = subprocess.run(
            [program, "--no-password", f"--dbname={database}", *arguments],
            env={**os.environ, **secrets},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise StartupError(
            f"{program} is not installed: install PostgreSQL's client programs, of the server's "
            "version or a later one"
        ) from error
    if done.returncode != 0:
        output = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise StartupError(f"{program} failed on the database {shown(url)}: {output}")
