from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.engine_harness import LIMIT_S, EngineHarness
from engines.ray_harness import RayHarness, Session, session

RAY = (pytest.mark.ray, pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A cluster of two nodes and an open engine on it, for all tests of a test process."""
    with session(tmp_path_factory.mktemp("ray")) as made:
        yield made


@pytest.fixture(params=["local", "local-watchdog", pytest.param("ray", marks=RAY)])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineHarness]:
    """Every test says what each engine promises, and leaves nothing behind."""
    if request.param == "ray":
        made: EngineHarness = RayHarness(tmp_path, request.getfixturevalue("ray_session"))
    else:
        made = _local(request.param, tmp_path)
    yield made
    nothing_is_left(made)


@pytest.fixture(params=["local", "local-watchdog"])
def local_harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineHarness]:
    """For tests of what the local engine alone has."""
    made = _local(request.param, tmp_path)
    yield made
    nothing_is_left(made)


@pytest.fixture
def ray_harness(ray_session: Session, tmp_path: Path) -> Iterator[RayHarness]:
    """For tests of what the Ray engine alone has."""
    made = RayHarness(tmp_path, ray_session)
    yield made
    nothing_is_left(made)


def _local(name: str, folder: Path) -> EngineHarness:
    """The best that this machine allows, or what is left to a user who may set up nothing."""
    return (
        EngineHarness(folder, "watchdog", "copy")
        if name == "local-watchdog"
        else EngineHarness(folder)
    )


def nothing_is_left(harness: EngineHarness) -> None:
    harness.close()
    end = time.monotonic() + LIMIT_S
    while harness.left() and time.monotonic() < end:
        harness.sweep()
        time.sleep(0.02)
    assert harness.left() == []
