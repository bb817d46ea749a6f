"""The databases of the store's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from postgresql_server import PostgreSQLServer, server


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database; each test that uses it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'operator.db'}"
    return str(request.getfixturevalue("empty_database"))


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables; each test that uses it runs on both kinds."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'operator.db'}"
        return
    postgresql: PostgreSQLServer = request.getfixturevalue("postgresql")
    name = postgresql.create()
    yield postgresql.url(name)
    postgresql.drop(name)


@pytest.fixture(scope="session")
def own_postgresql() -> Iterator[PostgreSQLServer]:
    """A server that a test may kill or set up differently; it runs again at the test's end.

    Its tests are marked with `KILLS_POSTGRESQL`.
    """
    with server() as running:
        yield running
