"""Fixtures of clusters whose machines are network namespaces."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from cluster.machines import Machines, machines

PROGRAMS = ["ip", "nft", "unshare", "setpriv"]


@pytest.fixture(scope="session", autouse=True)
def needs() -> None:
    """What every test of this folder needs of the machine."""
    assert os.geteuid() == 0, "machines of network namespaces need root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not missing, f"{missing} are missing: `make test-cluster` installs them"


@pytest.fixture
def empty() -> Iterator[Machines]:
    """No machine yet."""
    with machines() as made:
        yield made


@pytest.fixture
def cluster(empty: Machines) -> Machines:
    """A head, node n1 in zone a and node n2 in zone b, PostgreSQL and S3; no operator yet."""
    empty.start_storage()
    empty.start_head()
    empty.add_node("n1", labels="zone=a")
    empty.add_node("n2", labels="zone=b")
    return empty
