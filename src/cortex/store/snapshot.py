"""The database as it is at one moment, in a file, and back again. Called by backup and restore, which open no store:
the database of an older version stays as it is.

A file is copied by SQLite itself, and a PostgreSQL database by its own programs `pg_dump` and `pg_restore`; neither
keeps an operator from writing meanwhile.
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
from cortex.store.database import connect, unusable, words
from cortex.store.schema import REVISION
from cortex.store.url import shown

_OPERATORS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cortex %' AND datname = current_database()"


@dataclass(frozen=True)
class Snapshot:
    """What is kept beside a database, as it tells of that."""

    revision: str
    """Of its tables."""
    projects: dict[str, bool]
    """By their ids: whether an API or a job in progress needs it."""
    logs: dict[str, int]
    """By the jobs' ids: the bytes that are kept of each."""


def take(url: str, target: Path) -> Snapshot:
    """Copy a database into a file, which is made.

    Raises:
        StartupError: there is no operator's database, or it cannot be read.
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
    """What the copy of a file tells, which may have come from anywhere.

    Raises:
        StartupError: it is no whole database of an operator's, or of a version that is newer than this one.
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
        told = words(error) if isinstance(error, DBAPIError) else repr(error)
        raise StartupError(f"it holds no operator's database that can be read: {told}") from error
    finally:
        engine.dispose()
    check_revision(found.revision)
    return found


def check_revision(revision: str) -> None:
    """Whether this version can use tables of a revision.

    Raises:
        StartupError: a newer version made them.
    """
    if not revision.isdigit() or revision > REVISION:
        raise StartupError(
            f"it was made by a newer version, whose tables are of revision {revision!r}; those of this one are "
            f"of {REVISION}. Restore it with the version that made it."
        )


def check_is_free(url: str) -> None:
    """Whether a PostgreSQL database holds nothing of an operator's.

    Raises:
        StartupError: it does, or cannot be asked.
    """
    with _connected(url) as engine, engine.connect() as connection:
        if inspect(connection).has_table("alembic_version"):
            raise StartupError(
                f"the database {shown(engine.url)} has an operator's data: name an empty one with --store, or "
                "say --force to replace what it has"
            )


def check_is_unused(url: str) -> None:
    """Whether no operator is on a PostgreSQL database.

    Raises:
        StartupError: one is, or it cannot be asked.
    """
    with _connected(url) as engine, engine.connect() as connection:
        if connection.execute(text(_OPERATORS)).scalar_one():
            raise StartupError(
                f"the database {shown(engine.url)} is in use by an operator: stop it"
            )


def put_back(url: str, source: Path) -> None:
    """Make a PostgreSQL database what a snapshot of one was, all or nothing. Which operators there were is left out:
    those of the database that it was taken of may go on.

    Raises:
        StartupError: it cannot be done, and why.
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
    """An engine on a PostgreSQL database.

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
            f"there is no operator's database {path}; name its folder with --data-dir, or its database with --store"
        )
    try:
        with closing(sqlite.opened(path)) as source:
            sqlite.copy(source, target)
    except sqlite3.Error as error:
        raise StartupError(f"the database {path} cannot be copied: {error}") from error


def _check_is_operators(connection: Connection, name: str) -> None:
    if not inspect(connection).has_table("alembic_version"):
        raise StartupError(f"{name} is no operator's database")


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
    """Run one of PostgreSQL's own programs on a database. Arguments can be read by everybody: the password is none.

    Raises:
        StartupError: it is not there, or failed, and what it said.
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
            f"{program} is not there: install PostgreSQL's client programs, of the server's version or a later one"
        ) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"it ended with {done.returncode}"
        raise StartupError(f"{program} failed on the database {shown(url)}: {said}")
