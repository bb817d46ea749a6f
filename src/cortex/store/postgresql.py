"""What is PostgreSQL's own: the settings of a session that make a commit durable and a lost connection
known, and what a server has to be. Called by `store.database`, `writer`, `lease` and `changes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.pool import ConnectionPoolEntry

from cortex.errors import StartupError
from cortex.store.url import shown

if TYPE_CHECKING:
    import psycopg

ADVICE = (
    "Check that the server runs, that user, password and database are right, and that the database "
    "is the user's own."
)

_CONNECTIONS = 5, 35  # kept, and opened beside them where more are asked for at once: one a thread
# libpq's: whoever is on the other side of a broken network is given up after about a minute.
_NETWORK = {
    "connect_timeout": "5",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}
# Where a setting of the administrator's is stronger than `on` it stays. The other side gives up on us
# likewise: a transaction that is left open holds the row that tells of its commit, and a session that
# is left the lock that tells who drives.
_SESSION = """
SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') IN ('off', 'local', 'remote_write');
SELECT set_config('idle_in_transaction_session_timeout', '30s', false),
    set_config('tcp_keepalives_idle', '30', false),
    set_config('tcp_keepalives_interval', '10', false),
    set_config('tcp_keepalives_count', '3', false);
"""
_MIGRATING = 0x636F_7274_6578 << 8  # any number that nobody else takes
_CONFLICTS = {"40P01", "40001", "23505"}  # deadlock, serialisation, a key that is there already
_SERVER = text("SELECT current_setting('fsync'), pg_is_in_recovery()")


def connect(url: URL, name: str) -> Engine:
    """An engine on the database at a URL, whose sessions have a name. Nothing is connected yet."""
    kept, more = _CONNECTIONS
    engine = create_engine(
        url,
        connect_args=_options(url, name),
        pool_size=kept,
        max_overflow=more,
        hide_parameters=True,  # an error ends in a log
    )
    event.listen(engine, "connect", _set_up, insert=True)  # before SQLAlchemy asks for anything
    return engine


async def session(engine: Engine, name: str) -> psycopg.AsyncConnection:
    """A session of its own, to wait in: for a lock, or for what others tell.

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
    """Refuse a server that what was acknowledged is not safe with.

    Raises:
        StartupError: it is none that can be used, and why.
    """
    fsync, is_standby = connection.execute(_SERVER).one()
    where = f"the database {shown(connection.engine.url)} cannot be used:"
    if is_standby:
        raise StartupError(
            f"{where} its server is a standby, which takes no writes; name the primary"
        )
    if fsync != "on":
        raise StartupError(
            f"{where} its server runs with fsync = off, so a crash of its machine loses what was "
            "acknowledged. Set it with `ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();` there."
        )


def is_conflict(error: Exception) -> bool:
    """Whether another operator's transaction was in the way: the same may well be taken if it is tried
    again. One that stored the same Idempotency-Key meanwhile is found then."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state in _CONFLICTS


def lock_migrations(connection: Connection) -> None:
    """Let one at a time migrate; until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})


def _set_up(connection: psycopg.Connection, _: ConnectionPoolEntry) -> None:
    from psycopg.types.string import StrDumper

    class Text(StrDumper):
        """PostgreSQL's text holds any character but NUL."""

        def dump(self, obj: str) -> bytes | bytearray | memoryview | None:
            return super().dump(obj.replace("\0", "\ufffd"))

    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StartupError(
            f"the database {connection.info.dbname} cannot be used: its encoding is {encoding}. Make "
            "another with `createdb --encoding=UTF8 --template=template0`."
        )
    connection.adapters.register_dumper(str, Text)
    connection.execute(_SESSION)
    connection.commit()
