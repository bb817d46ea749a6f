"""The database: its settings, its migrations, and the thread that groups commits.

Every write is a function of a connection. The writer takes all that wait, runs them in one
transaction and commits once: a hundred submits share one fsync. A write that fails makes its group
run one by one, each in a transaction of its own, so it takes no other down; a write must therefore
be a function of the database alone.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from cortex.errors import CortexError, StartupError, StorageUnavailable

T = TypeVar("T")
Write = Callable[[Connection], T]

_GROUP = 512  # writes per commit: bounds how long the first of them waits for the last
_BUSY_TIMEOUT_S = 30


def connect(url: str) -> Engine:
    """An engine on the database at an SQLAlchemy URL."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: object, _: ConnectionPoolEntry) -> None:
    # The driver's own transaction handling opens none before a SELECT and commits before DDL; with
    # isolation_level None it does nothing and `_begin_sqlite` opens every one.
    connection.isolation_level = None  # type: ignore[attr-defined]  # SQLAlchemy types it as a bare DBAPI
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL: the WAL is fsynced at each commit, so an acknowledged one survives power loss
    # (https://www.sqlite.org/pragma.html#pragma_synchronous).
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def migrate(engine: Engine) -> None:
    """Bring the schema to this version's.

    Raises:
        StartupError: the database cannot be read or written, or is newer than this version.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except DBAPIError as error:
        raise StartupError(
            f"the database {engine.url.database} cannot be used: {error.orig}. Check that the disk "
            "has room and that this user may write there; a damaged file has to be restored."
        ) from error
    except CommandError as error:
        raise StartupError(
            f"the database {engine.url.database} was made by another version: {error}. "
            "Start the newest version that was used with it."
        ) from error


class Writer:
    """The one thread that writes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    async def run(self, write: Write[T]) -> T:
        """Run a write; it is durable when this returns. Writes take effect in the order of calls.

        Raises:
            StorageUnavailable: the database did not take it; nothing was stored.
            CortexError: what the write raised; nothing was stored.
        """
        job = _Job(write, asyncio.get_running_loop())
        self._waiting.put(job)
        # Shielded: a client that hangs up does not undo a write that is already queued.
        return cast(T, await asyncio.shield(job.done))

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            group = [first]
            last = False
            while len(group) < _GROUP and not self._waiting.empty():
                following = self._waiting.get()
                if following is None:
                    last = True
                    break
                group.append(following)
            self._commit(group)
            if last:
                return

    def _commit(self, group: list[_Job]) -> None:
        outcomes: list[object] = []
        try:
            with self._connection() as connection, connection.begin():
                outcomes = [job.write(connection) for job in group]
        except Exception as error:
            if len(group) > 1:
                for job in group:
                    self._commit([job])
                return
            outcomes = [_told(error)]
        _deliver(group, outcomes)

    def _connection(self) -> Connection:
        return self._engine.connect().execution_options(writes=True)


class _Job:
    __slots__ = ("done", "loop", "write")

    def __init__(self, write: Write[object], loop: asyncio.AbstractEventLoop) -> None:
        self.write = write
        self.loop = loop
        self.done: asyncio.Future[object] = loop.create_future()


def _told(error: Exception) -> Exception:
    if isinstance(error, OperationalError):
        return StorageUnavailable(f"the store takes no writes now: {error.orig}. Try again later.")
    return error


def _deliver(group: list[_Job], outcomes: list[object]) -> None:
    def on_loop() -> None:
        for job, outcome in zip(group, outcomes, strict=True):
            if job.done.done():
                continue
            if isinstance(outcome, Exception):
                job.done.set_exception(outcome)
            else:
                job.done.set_result(outcome)

    try:
        group[0].loop.call_soon_threadsafe(on_loop)
    except RuntimeError:  # the loop was closed: nobody is left to tell
        return


def storage_error(error: DBAPIError) -> CortexError:
    """What a failed read means to a caller."""
    return StorageUnavailable(f"the store cannot be read now: {error.orig}. Try again later.")
