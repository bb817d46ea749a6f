"""The database: its connections, its migrations, and reads.

Called by `Store`. Writes go through `writer`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from cortex.errors import StartupError, StorageUnavailable
from cortex.store import postgresql, sqlite
from cortex.store.schema import REVISION
from cortex.store.url import read as read_url
from cortex.store.url import shown

T = TypeVar("T")


def connect(url: str, name: str = "cortex") -> Engine:
    """An engine for the database at a PostgreSQL URL as users write it, or at `sqlite:///PATH`.

    Args:
        name: of the engine's sessions on a server.

    Raises:
        StartupError: the URL is invalid, or the file cannot be created.
    """
    if url.startswith("sqlite:"):
        return sqlite.connect(url)
    try:
        return postgresql.connect(read_url(url), name)
    except ValueError as error:
        raise StartupError(f"the store: {error}") from error


def migrate(engine: Engine) -> None:
    """Upgrade the schema to this version's.

    Raises:
        StartupError: the database cannot be used, or a newer version has upgraded it.
    """
    is_shared = engine.dialect.name == "postgresql"
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            if is_shared:
                postgresql.check(connection)
                postgresql.lock_migrations(connection)
            if not _is_current(connection):
                _upgrade(connection)
    except DBAPIError as error:
        raise unusable(engine, error) from error


def _is_current(connection: Connection) -> bool:
    """Whether the schema is current, as at nearly every start: Alembic takes long to import."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
    return found == [REVISION]


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StartupError(
            f"the database {_name(connection.engine)} belongs to another version of Cortex: "
            f"{error}. Start the newest version that has used this database."
        ) from error


def unusable(engine: Engine, error: DBAPIError) -> StartupError:
    """The StartupError for a database error while the operator starts."""
    advice = sqlite.ADVICE if engine.dialect.name == "sqlite" else postgresql.ADVICE
    return StartupError(
        f"the database {_name(engine)} cannot be used: {error_text(error)}. {advice}"
    )


def reader(engine: Engine) -> Engine:
    """The engine for reads, without transactions on a server.

    A read is one statement, or its statements need no common snapshot, so BEGIN and COMMIT would
    only cost round trips.
    """
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def read(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Run a read; once more, on a new connection, if the pooled one turns out to be lost.

    Raises:
        StorageUnavailable: the database does not answer.
    """
    try:
        try:
            with engine.connect() as connection:
                return work(connection)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            engine.dispose()  # the pool's other connections may be lost as well
            with engine.connect() as connection:
                return work(connection)
    except DBAPIError as error:
        raise StorageUnavailable(
            f"the store cannot be read: {error_text(error)}; try again later"
        ) from error


def error_text(error: DBAPIError) -> str:
    """The message of the database, in one line."""
    return " ".join(str(error.orig).split())


def _name(engine: Engine) -> str:
    is_file = engine.dialect.name == "sqlite"
    return str(engine.url.database) if is_file else shown(engine.url)
