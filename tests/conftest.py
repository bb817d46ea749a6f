"""Fixtures for every folder of tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from _pytest.nodeid import coerce_node_id

import s3_server
from client_variants import AwaitedClient, Connect, client_in_a_task
from cortex.sdk import Client
from cortex.store import Store
from cortex.store.schema import metadata
from operator_harness import PROBE, Operator, operator, probe_yaml
from operator_proxy import OperatorProxy
from postgresql_server import PostgreSQLServer, server
from s3_server import S3Server

# A shell starts background commands with SIGINT and SIGQUIT ignored. Child processes would inherit
# that, and plain programs would differ from jobs.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator for all tests of a test process. They must not kill or fill it."""
    with operator(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture(scope="session")
def probe(shared_operator: Operator) -> str:
    """The endpoint of the probe on the shared operator."""
    return shared_operator.deployed(probe_yaml(), {"probe.py": PROBE})


@pytest.fixture
def own_operator(tmp_path: Path) -> Iterator[Operator]:
    """An operator with one core, for one test, which may kill it."""
    with operator(tmp_path, "--cpu", "1") as running:
        yield running


@pytest.fixture
def long_grace_operator(tmp_path: Path) -> Iterator[Operator]:
    """An operator that gives a stopped job enough time to save its work, even on a busy machine."""
    with operator(tmp_path, "--grace", "30") as running:
        yield running


@pytest.fixture(params=[Client, AwaitedClient, client_in_a_task], ids=["sync", "async", "task"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Makes a client. Each test that uses this fixture runs once for every kind of client."""
    made: Connect = request.param
    return made


@pytest.fixture
def operator_proxy(own_operator: Operator) -> Iterator[OperatorProxy]:
    """A proxy to an operator with the probe deployed. The test may kill the operator."""
    own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    with closing(OperatorProxy(own_operator)) as made:
        yield made


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQLServer]:
    """A PostgreSQL server for all tests of a test process. They must not kill it."""
    with server() as running:
        yield running


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server for all tests of a test process. They must not stop it."""
    with s3_server.server() as running:
        yield running


@pytest.fixture(scope="session")
def migrated_database(postgresql: PostgreSQLServer) -> str:
    """The name of a database with the store's tables, the template of other databases."""
    name = postgresql.create()
    Store(postgresql.url(name)).close()
    return name


@pytest.fixture(scope="session")
def reused_database(postgresql: PostgreSQLServer, migrated_database: str) -> str:
    return postgresql.create(template=migrated_database)


@pytest.fixture
def empty_database(postgresql: PostgreSQLServer, reused_database: str) -> str:
    """The URL of a database whose tables are empty.

    Emptying one takes about 50 ms, making and dropping one more than a second. TRUNCATE takes five
    times as long as DELETE, since it makes new files and syncs them.
    """
    tables = [table.name for table in reversed(metadata.sorted_tables)]
    with postgresql.connected(reused_database) as connection, connection.transaction():
        # The lock waits for transactions of an earlier test, whose sessions may end late.
        connection.execute(f"LOCK TABLE {', '.join(tables)}")
        for table in tables:
            connection.execute(f"DELETE FROM {table}")
        connection.execute("SELECT setval(sequencename::regclass, 1, false) FROM pg_sequences")
    return postgresql.url(reused_database)


@pytest.fixture
def database(postgresql: PostgreSQLServer, migrated_database: str) -> Iterator[str]:
    """The URL of a database for one test."""
    name = postgresql.create(template=migrated_database)
    yield postgresql.url(name)
    postgresql.drop(name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the xdist group of each test into its node id.

    pytest-xdist 3.8 appends the group to an attribute that pytest 9.2 no longer reads. Without this
    hook each worker would start the servers of all groups.
    """
    for item in items:
        grouped = getattr(item, "_nodeid", None)
        if grouped is not None and grouped != item.nodeid:
            item._id = coerce_node_id(grouped)
