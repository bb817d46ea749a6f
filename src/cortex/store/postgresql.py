"""PostgreSQL: session settings for durable commits and lost connections, and checks of the server.

Called by `store.database`, `prepared`, `writer`, and `group.election` and `group.notifications`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from cortex.errors import StartupError
from cortex.store.lock_keys import MIGRATION_LOCK
from cortex.store.url import shown

if TYPE_CHECKING:
    import psycopg

ADVICE = (
    "Check that the server is running, that the user, password and database are right, and that "
    "the user owns the database."
)

# Open connections that the pool keeps, and how many more it opens at need: each thread uses one.
_POOL_SIZE, _MAX_OVERFLOW = 5, 35
# Parameters of libpq: a connection over a broken network fails after about a minute.
_NETWORK = {
    "connect_timeout": "5",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}
# A `synchronous_commit` of the administrator's that is stronger than `on` stays. The timeouts make
# the server give up a lost client: an open transaction would keep its operator's row locked, and a
# lost session the leader lock.
_SESSION = """
SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') IN ('off', 'local', 'remote_write');
SELECT set_config('idle_in_transaction_session_timeout', '30s', false),
    set_config('tcp_keepalives_idle', '30', false),
    set_config('tcp_keepalives_interval', '10', false),
    set_config('tcp_keepalives_count', '3', false);
"""
_CONFLICTS = {"40P01", "40001", "23505"}  # deadlock, serialization failure, unique violation
# The driver warns of an error that follows from one that it raises, as text of several forms among
# the operator's log lines.
logging.getLogger("psycopg").setLevel(logging.ERROR)
_SERVER = text("SELECT current_setting('fsync'), pg_is_in_recovery()")


def connect(url: URL, name: str) -> Engine:
    """An engine for the database at a URL, whose sessions have this name. It connects later."""
    engine = create_engine(
        url,
        connect_args=_options(url, name),
        pool_size=_POOL_SIZE,
        max_overflow=_MAX_OVERFLOW,
        hide_parameters=True,  # errors are logged
    )
    event.listen(engine, "connect", _set_up, insert=True)  # before SQLAlchemy's own first query
    return engine


async def session(engine: Engine, name: str) -> psycopg.AsyncConnection:
    """A session outside the pool, to wait in for a lock or for notifications.

    Raises:
        psycopg.Error: the server does not answer.
    """
    import psycopg

    _, options = engine.dialect.create_connect_args(engine.url)
    options.update(_options(engine.url, name))
    return await psycopg.AsyncConnection.connect(**options, autocommit=True)


def _options(url: URL, name: str) -> dict[str, str]:
    return {k: v for k, v in _NETWORK.items() if k not in url.query} | {"application_name": name}


def check(connection: Connection) -> None:
    """Refuse a server on which acknowledged commits are not safe.

    Raises:
        StartupError: the server is a standby, or runs without fsync.
    """
    fsync, is_standby = connection.execute(_SERVER).one()
    problem = f"the database {shown(connection.engine.url)} cannot be used:"
    if is_standby:
        raise StartupError(
            f"{problem} its server is a standby, which accepts no writes; use the primary server"
        )
    if fsync != "on":
        raise StartupError(
            f"{problem} its server runs with fsync = off, so a crash of its machine loses "
            "acknowledged data. Run `ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();` on the "
            "server."
        )


def first_of_each(
    connection: Connection, statements: Sequence[tuple[str, Sequence[Any] | Mapping[str, Any]]]
) -> list[Sequence[Any] | None]:
    """Run statements on the driver's connection in one round trip; the first row of each, or None.

    SQLAlchemy cannot use the driver's pipeline. Errors are raised as SQLAlchemy's.
    """
    import psycopg

    driver: psycopg.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # typed as a bare DBAPI
    try:
        with driver.pipeline():
            cursors = [driver.execute(sql, values) for sql, values in statements]
        # The end of the block has received all results.
        return [cursor.fetchone() if cursor.description else None for cursor in cursors]
    except psycopg.Error as error:
        raise DBAPIError.instance(
            None,
            None,
            error,
            psycopg.Error,
            connection_invalidated=driver.closed,
            dialect=connection.dialect,
        ) from error


def is_conflict(error: Exception) -> bool:
    """Whether the write conflicted with another operator's transaction: a retry may succeed.

    A retried submit finds the job that the other operator stored with the same Idempotency-Key.
    """
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state in _CONFLICTS


def lock_migrations(connection: Connection) -> None:
    """Let one operator at a time migrate; the lock lasts until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})


def _set_up(connection: psycopg.Connection, _: ConnectionPoolEntry) -> None:
    from psycopg.types.string import StrDumper

    class Text(StrDumper):
        """PostgreSQL's text can hold any character except NUL."""

        def dump(self, obj: str) -> bytes | bytearray | memoryview | None:
            return super().dump(obj.replace("\0", "\ufffd"))

    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StartupError(
            f"the database {connection.info.dbname} cannot be used: its encoding is {encoding}, "
            "not UTF8. Create another with `createdb --encoding=UTF8 --template=template0`."
        )
    connection.adapters.register_dumper(str, Text)
    connection.execute(_SESSION)
    connection.commit()
