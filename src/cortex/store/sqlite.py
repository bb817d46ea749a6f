"""SQLite: a private file that must stay in place, and the settings that make a commit durable.

Called by `store.database`, `writer` and `Store`.
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
    "Check that the disk has free space and that this user may write there; restore a damaged file "
    "from a backup."
)

SAVED = ".saved-"
"""Part of the name of the copy that is saved when the database file disappears."""

_BUSY_TIMEOUT_S = 10
_FILES = ("", "-wal", "-shm")


def connect(url: str) -> Engine:
    """An engine for the file at a URL. Creates a missing file here, and never later."""
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
    """A connection to an existing file.

    Raises:
        sqlite3.Error: there is no such file, or it cannot be opened.
    """
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw",
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
        check_same_thread=False,
    )


def is_locked(error: Exception) -> bool:
    """Whether the timeout expired while another process was writing."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


class DatabaseFile:
    """The files of an open database, and the check that they are still in place.

    If a file was removed, moved or replaced, this process still writes to the open file, and all
    data would disappear when the process ends. The operator then accepts no writes until the files
    are back.
    """

    def __init__(self, engine: Engine) -> None:
        """
        Args:
            engine: that has not written yet.

        Raises:
            StartupError: the files cannot be opened.
        """
        self._path = Path(str(engine.url.database))
        # SQLite removes no file while a connection is open. The connection opens the files when it
        # first reads.
        try:
            self._connection = opened(self._path)
            self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise StartupError(
                f"the database {self._path} cannot be used: {error}. {ADVICE}"
            ) from error
        self._files = [(f"{self._path}{end}", _identity(f"{self._path}{end}")) for end in _FILES]
        self._problem: str | None = None
        self._saved_copy = self._path
        event.listen(engine, "connect", self._check, insert=True)

    def problem(self) -> str | None:
        """What is wrong with the files and what to do, or None. Called by the thread that writes.

        The first call that finds a problem saves all data in a copy.
        """
        name = self._misplaced_file()
        if name is None:
            if self._problem is not None:  # the files are back
                self._problem = None
                with suppress(OSError):
                    self._saved_copy.unlink()
        elif self._problem is None:
            self._problem = (
                f"{name} was removed, moved or replaced while the operator runs. The operator "
                f"accepts no more changes, for they would be lost when it ends. {self._save()}"
            )
        return self._problem

    def close(self) -> None:
        """Close the connection: with the last one, SQLite writes everything into the one file."""
        self._connection.close()

    def _check(self, *_: object) -> None:
        """Refuse a new connection, which would read the file that has replaced the database."""
        name = self._misplaced_file()
        if name is not None:
            raise StorageUnavailable(f"the store cannot be read: {name} was removed or replaced")

    def _misplaced_file(self) -> str | None:
        return next((name for name, identity in self._files if _identity(name) != identity), None)

    def _save(self) -> str:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{self._path.name}{SAVED}{stamp}-{os.getpid()}"
        self._saved_copy = path = self._path.with_name(name)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            copy(self._connection, path)
        except (OSError, sqlite3.Error) as error:
            with suppress(OSError):
                path.unlink()
            return (
                f"The data could not be saved as {path}: {error}. Put the file back in its place, "
                "or restore a backup."
            )
        return (
            f"All data was saved as {path}. Stop the operator, {restore_instructions(self._path)} "
            "The jobs keep running meanwhile."
        )


def restore_instructions(path: Path) -> str:
    """What to do with the saved copy of a database."""
    # SQLite would apply a remaining -wal of the lost file to the copy.
    return (
        f"remove {path}-wal and {path}-shm, rename the saved file to {path}, and start the "
        "operator again."
    )


def copy(source: sqlite3.Connection, path: Path) -> None:
    """Copy a database, as it is at one moment, into another file, and sync that file to disk.

    The copy blocks neither readers nor writers of the database.

    Raises:
        sqlite3.Error: the database cannot be read, or the copy cannot be written.
    """
    with closing(sqlite3.connect(path)) as target:
        target.execute("PRAGMA synchronous=FULL")
        source.backup(target)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  # runs at each commit: making a Path doubles its time
    except OSError:
        return None
    return found.st_dev, found.st_ino


def first(
    connection: Connection, sql: str, values: Sequence[object] | Mapping[str, object] = ()
) -> Sequence[Any] | None:
    """Run a statement on the driver's connection; its first row, or None.

    SQLAlchemy's own execution takes several times as long as a short statement does. Errors are
    raised as SQLAlchemy's.
    """
    driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # typed as a bare DBAPI
    try:
        row: Sequence[Any] | None = driver.execute(sql, values).fetchone()
        return row
    except sqlite3.Error as error:
        raise DBAPIError.instance(
            sql, None, error, sqlite3.Error, dialect=connection.dialect
        ) from error


def _make_private(database: Path) -> None:
    """Only the operator may read the jobs' data. SQLite gives its other files the same mode."""
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database.chmod(0o600)
    except OSError as error:
        raise StartupError(
            f"the database {database} cannot be used: {error}. Check that the disk has free space "
            "and that this user may write there."
        ) from error


def _set_up(connection: object, _: ConnectionPoolEntry) -> None:
    # The driver's own transaction handling begins none before a SELECT, and commits before DDL.
    # With isolation_level None it does nothing, and `_begin` begins every transaction.
    connection.isolation_level = None  # type: ignore[attr-defined]  # SQLAlchemy types it as a bare DBAPI
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL: SQLite fsyncs the WAL at each commit, so an acknowledged commit survives a power loss
    # (https://www.sqlite.org/pragma.html#pragma_synchronous).
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.close()


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    first(connection, "BEGIN IMMEDIATE" if writes else "BEGIN")
