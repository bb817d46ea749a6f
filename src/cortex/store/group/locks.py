"""Locks between the operators of a PostgreSQL database.

`Store` makes two locks. An operator holds `deploy_lock` while it deploys, deletes an API, or
removes unused versions. It holds `join_lock` while it determines its data folder's id and joins.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from cortex.errors import StorageUnavailable

_ACQUIRE = text("SELECT pg_advisory_xact_lock(:key)")
# The server ends the session of a hanging holder after this time; a project is unpacked in less.
_SET_TIMEOUT = text("SET LOCAL idle_in_transaction_session_timeout = '120s'")


class DatabaseLock:
    """A lock between the tasks of this operator and, on PostgreSQL, between all operators."""

    def __init__(self, engine: Engine | None, key: int) -> None:
        """
        Args:
            engine: of the PostgreSQL database; None for a lock inside this process only.
            key: of the advisory lock.
        """
        self._engine = engine
        self._key = key
        self._local_lock = asyncio.Lock()
        self._connection: Connection | None = None

    async def __aenter__(self) -> None:
        """
        Raises:
            StorageUnavailable: the database does not answer.
        """
        await self._local_lock.acquire()
        if self._engine is None:
            return
        acquiring = asyncio.ensure_future(asyncio.to_thread(_acquire, self._engine, self._key))
        try:
            self._connection = await asyncio.shield(acquiring)
        except BaseException:
            acquiring.add_done_callback(_release_late)  # the caller no longer waits for it
            self._local_lock.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                await asyncio.to_thread(_release, connection)
        finally:
            self._local_lock.release()


def _acquire(engine: Engine, key: int) -> Connection:
    try:
        try:
            return _locked_connection(engine, key)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            engine.dispose()  # the pool's other connections may be lost as well
            return _locked_connection(engine, key)
    except DBAPIError as error:
        raise StorageUnavailable(
            "the store does not answer, or another operator holds its lock for too long; try again "
            "later"
        ) from error


def _locked_connection(engine: Engine, key: int) -> Connection:
    connection = engine.connect().execution_options(isolation_level="READ COMMITTED")
    try:
        connection.execute(_SET_TIMEOUT)
        connection.execute(_ACQUIRE, {"key": key})
    except BaseException:
        connection.close()
        raise
    return connection


def _release_late(acquiring: asyncio.Future[Connection]) -> None:
    if not acquiring.cancelled() and acquiring.exception() is None:
        asyncio.get_running_loop().run_in_executor(None, _release, acquiring.result())


def _release(connection: Connection) -> None:
    with suppress(DBAPIError):  # the lock ended with a session that was lost
        connection.rollback()
    with suppress(DBAPIError):
        connection.close()
