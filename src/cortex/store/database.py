"""The database: how it is reached, its migrations, and reads. Called by `Store`; what is written goes
through `writer`.
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
    """An engine on the database at an SQLAlchemy URL, or at a PostgreSQL one as users write it.

    Args:
        name: of its sessions, where a server has any.

    Raises:
        StartupError: it is no such URL, or the file cannot be made.
    """
    if url.startswith("sqlite:"):
        return sqlite.connect(url)
    try:
        return postgresql.connect(read_url(url), name)
    except ValueError as error:
        raise StartupError(f"the store: {error}") from error


def migrate(engine: Engine) -> None:
    """Bring the schema to this version's.

    Raises:
        StartupError: the database cannot be read or written, or is newer than this version.
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
    """Whether there is nothing to migrate, as at nearly every start: what does it takes long to load."""
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
            f"the database {_name(connection.engine)} was made by another version: {error}. "
            "Start the newest version that was used with it."
        ) from error


def unusable(engine: Engine, error: DBAPIError) -> StartupError:
    """What an error of the database means at the start."""
    advice = sqlite.ADVICE if engine.dialect.name == "sqlite" else postgresql.ADVICE
    return StartupError(f"the database {_name(engine)} cannot be used: {words(error)}. {advice}")


def reader(engine: Engine) -> Engine:
    """The same database for reads. Each is one statement, or does not need its statements to agree: a
    server need not be told where it begins and ends."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def read(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Run a read; on a new connection where the one that was kept turns out to be lost.

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
            engine.dispose()  # the pool may hold others that were lost likewise
            with engine.connect() as connection:
                return work(connection)
    except DBAPIError as error:
        raise StorageUnavailable(
            f"the store cannot be read now: {words(error)}. Try again later."
        ) from error


def words(error: DBAPIError) -> str:
    """What the database says, in one line."""
    return " ".join(str(error.orig).split())


def _name(engine: Engine) -> str:
    is_file = engine.dialect.name == "sqlite"
    return str(engine.url.database) if is_file else shown(engine.url)
