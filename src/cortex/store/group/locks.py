"""Whose turn it is to change which versions there are, or to join: one at a time, of all operators of a
database. Made by `Store.in_turn`, held by whoever deploys, deletes, or clears away what is not used, and by
`Store.joining`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from cortex.errors import StorageUnavailable

VERSIONS = 0x636F_7274_6578 << 4  # any number that nobody else takes
JOIN = VERSIONS + 1
_LOCK = text("SELECT pg_advisory_xact_lock(:key)")
# One that hangs holds the others up for so long; a project is unpacked in less.
_PATIENCE = text("SET LOCAL idle_in_transaction_session_timeout = '120s'")


class DatabaseLock:
    """An asyncio lock, and one of the database's where it has several operators."""

    def __init__(self, engine: Engine | None, key: int = VERSIONS) -> None:
        self._engine = engine
        self._key = key
        self._here = asyncio.Lock()
        self._held: Connection | None = None

    async def __aenter__(self) -> None:
        """
        Raises:
            StorageUnavailable: the database does not answer.
        """
        await self._here.acquire()
        if self._engine is None:
            return
        taking = asyncio.ensure_future(asyncio.to_thread(_take, self._engine, self._key))
        try:
            self._held = await asyncio.shield(taking)
        except BaseException:
            taking.add_done_callback(_give_back_late)  # nobody waits for it any more
            self._here.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        held, self._held = self._held, None
        try:
            if held is not None:
                await asyncio.to_thread(_give_back, held)
        finally:
            self._here.release()


def _take(engine: Engine, key: int) -> Connection:
    try:
        try:
            return _locked(engine, key)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            engine.dispose()  # the pool may hold others that were lost likewise
            return _locked(engine, key)
    except DBAPIError as error:
        raise StorageUnavailable(
            "the store does not answer now, or another operator holds it up. Try again later."
        ) from error


def _locked(engine: Engine, key: int) -> Connection:
    connection = engine.connect().execution_options(isolation_level="READ COMMITTED")
    try:
        connection.execute(_PATIENCE)
        connection.execute(_LOCK, {"key": key})
    except BaseException:
        connection.close()
        raise
    return connection


def _give_back_late(taking: asyncio.Future[Connection]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        asyncio.get_running_loop().run_in_executor(None, _give_back, taking.result())


def _give_back(connection: Connection) -> None:
    with suppress(DBAPIError):  # a session that was lost holds nothing any more
        connection.rollback()
    with suppress(DBAPIError):
        connection.close()
