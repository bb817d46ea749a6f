"""What is SQLite's own: a private file, and the settings that make a commit durable. Called by
`store.database`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from cortex.errors import StartupError

ADVICE = (
    "Check that the disk has room and that this user may write there; a damaged file has to be "
    "restored."
)

_BUSY_TIMEOUT_S = 30


def connect(url: str) -> Engine:
    """An engine on the file at a URL, which is made where it is missing."""
    engine = create_engine(url, hide_parameters=True)  # an error ends in a log
    _make_private(Path(str(engine.url.database)))
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def first(
    connection: Connection, sql: str, values: Sequence[object] | Mapping[str, object] = ()
) -> Sequence[Any] | None:
    """Run a statement by the driver itself, to which SQLAlchemy's way takes several times as long as a
    short one does; its first row, if there is one. Errors are SQLAlchemy's own."""
    driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # typed as a bare DBAPI
    try:
        row: Sequence[Any] | None = driver.execute(sql, values).fetchone()
        return row
    except sqlite3.Error as error:
        raise DBAPIError.instance(
            sql, None, error, sqlite3.Error, dialect=connection.dialect
        ) from error


def _make_private(database: Path) -> None:
    """What it holds of jobs is nobody else's; SQLite gives its other files the same mode."""
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database.chmod(0o600)
    except OSError as error:
        raise StartupError(
            f"the database {database} cannot be used: {error}. Check that the disk has room and that "
            "this user may write there."
        ) from error


def _set_up(connection: object, _: ConnectionPoolEntry) -> None:
    # The driver's own transaction handling opens none before a SELECT and commits before DDL; with
    # isolation_level None it does nothing and `_begin` opens every one.
    connection.isolation_level = None  # type: ignore[attr-defined]  # SQLAlchemy types it as a bare DBAPI
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL: the WAL is fsynced at each commit, so an acknowledged one survives power loss
    # (https://www.sqlite.org/pragma.html#pragma_synchronous).
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.close()


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    first(connection, "BEGIN IMMEDIATE" if writes else "BEGIN")
