"""Fixtures that every folder of tests may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import PROBE, Operator, operator, probe_yaml


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator for all tests of a test process that neither kill nor fill it."""
    with operator(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture(scope="session")
def probe(shared: Operator) -> str:
    """The endpoint of the probe on the shared operator."""
    return shared.deployed(probe_yaml(), {"probe.py": PROBE})


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Operator]:
    """An operator for one test, which may kill it; it has one core for jobs."""
    with operator(tmp_path, "--cpu", "1") as running:
        yield running
