"""What is SQLite's own: a private file that has to stay where it is, and the settings that make a commit durable.
Called by `store.database`, and by the store for the file.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from cortex.errors import StartupError, StorageUnavailable

ADVICE = (
    "Check that the disk has room and that this user may write there; a damaged file has to be "
    "restored."
)

SAVED = ".saved-"
"""In the name of a copy that is saved of a database whose file is gone."""

_BUSY_TIMEOUT_S = 10
_FILES = ("", "-wal", "-shm")


def connect(url: str) -> Engine:
    """An engine on the file at a URL, which is made where it is missing, and never again."""
    path = Path(str(make_url(url).database))
    _make_private(path)
    engine = create_engine(
        url,
        creator=lambda: opened(path),
        hide_parameters=True,  # an error ends in a log
    )
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def opened(path: Path) -> sqlite3.Connection:
    """A connection to a file that is there.

    Raises:
        sqlite3.Error: it is not.
    """
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw",
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
        check_same_thread=False,
    )


def is_locked(error: Exception) -> bool:
    """Whether another process was writing all the while."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


class DatabaseFile:
    """The files of a database that is open. Where something else, or nothing, has their names, all that is stored
    is gone as soon as this process is: it is lost then, until they are back."""

    def __init__(self, engine: Engine) -> None:
        """
        Args:
            engine: on which nobody has begun to write.

        Raises:
            StartupError: they cannot be opened.
        """
        self._path = Path(str(engine.url.database))
        # As long as one connection is open, SQLite removes none of the files. It reads once to have them open.
        try:
            self._connection = opened(self._path)
            self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise StartupError(
                f"the database {self._path} cannot be used: {error}. {ADVICE}"
            ) from error
        self._files = [(f"{self._path}{end}", _identity(f"{self._path}{end}")) for end in _FILES]
        self._words: str | None = None
        self._saved = self._path
        event.listen(engine, "connect", self._check, insert=True)

    def lost(self) -> str | None:
        """What is wrong, and what to do; None where nothing is. The first time, all that is stored is saved in a
        copy. Called by the thread that writes."""
        name = self._missing()
        if name is None:
            if self._words is not None:  # they are back
                self._words = None
                with suppress(OSError):
                    self._saved.unlink()
        elif self._words is None:
            self._words = (
                f"{name} was removed, moved or replaced under the operator, which takes no changes any more: "
                f"they would be gone with its process. {self._save()}"
            )
        return self._words

    def close(self) -> None:
        """The last connection that closes writes all into the one file."""
        self._connection.close()

    def _check(self, *_: object) -> None:
        """What has taken the file's place is not read: it would answer for what is stored."""
        name = self._missing()
        if name is not None:
            raise StorageUnavailable(
                f"the store cannot be read now: {name} was removed or replaced"
            )

    def _missing(self) -> str | None:
        return next((name for name, identity in self._files if _identity(name) != identity), None)

    def _save(self) -> str:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._saved = path = self._path.with_name(f"{self._path.name}{SAVED}{stamp}-{os.getpid()}")
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            copy(self._connection, path)
        except (OSError, sqlite3.Error) as error:
            with suppress(OSError):
                path.unlink()
            return (
                f"All that is stored could not be saved as {path}: {error}. Put the file back where it was, if "
                "you have it; else restore a backup."
            )
        return f"All that is stored was saved as {path}. Stop the operator, {put_back(self._path)} Jobs go on meanwhile."


def put_back(path: Path) -> str:
    """What to do with a copy that was saved of a database."""
    # What is left of the files beside the lost one would be taken for a part of this one.
    return f"remove {path}-wal and {path}-shm, give the saved file the name {path}, and start the operator again."


def copy(source: sqlite3.Connection, path: Path) -> None:
    """Copy a database as it is at one moment into a file of its own, on the disk. Nobody waits for it.

    Raises:
        sqlite3.Error: it cannot be read, or not be written.
    """
    with closing(sqlite3.connect(path)) as target:
        target.execute("PRAGMA synchronous=FULL")
        source.backup(target)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        about = os.stat(path)  # noqa: PTH116  # for each commit: to make a Path takes as long again
    except OSError:
        return None
    return about.st_dev, about.st_ino


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
