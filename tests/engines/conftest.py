"""The engines that the tests of this folder run on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.engine_harness import LIMIT_S, EngineHarness
from engines.ray_harness import RayHarness, RaySession, open_session

RAY = (pytest.mark.ray, pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RaySession]:
    """A cluster of two nodes and an open engine on it, shared by all tests of a test process."""
    with open_session(tmp_path_factory.mktemp("ray")) as made:
        yield made


@pytest.fixture(params=["local", "local-watchdog", pytest.param("ray", marks=RAY)])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineHarness]:
    """Every engine in turn, for tests of common promises. Asserts that no process is left."""
    if request.param == "ray":
        made: EngineHarness = RayHarness(tmp_path, request.getfixturevalue("ray_session"))
    else:
        made = _local(request.param, tmp_path)
    yield made
    assert_no_leftovers(made)


@pytest.fixture(params=["local", "local-watchdog"])
def local_harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineHarness]:
    """The local engine: for tests of its own promises."""
    made = _local(request.param, tmp_path)
    yield made
    assert_no_leftovers(made)


@pytest.fixture
def ray_harness(ray_session: RaySession, tmp_path: Path) -> Iterator[RayHarness]:
    """The Ray engine: for tests of its own promises."""
    made = RayHarness(tmp_path, ray_session)
    yield made
    assert_no_leftovers(made)


def _local(name: str, folder: Path) -> EngineHarness:
    """With the best limits and workspaces of this machine, or those of an unprivileged user."""
    return (
        EngineHarness(folder, "watchdog", "copy")
        if name == "local-watchdog"
        else EngineHarness(folder)
    )


def assert_no_leftovers(harness: EngineHarness) -> None:
    harness.close()
    end = time.monotonic() + LIMIT_S
    while harness.leftovers() and time.monotonic() < end:
        harness.remove_orphaned_groups()
        time.sleep(0.02)
    assert harness.leftovers() == []
