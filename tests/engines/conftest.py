from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.bench import LIMIT_S, Bench
from engines.ray_bench import RayBench, Session, session

RAY = (pytest.mark.ray, pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A cluster of two nodes and an open engine on it, for all tests of a test process."""
    with session(tmp_path_factory.mktemp("ray")) as made:
        yield made


@pytest.fixture(params=["local", "local-watchdog", pytest.param("ray", marks=RAY)])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """Every test says what each engine promises, and leaves nothing behind."""
    if request.param == "ray":
        made: Bench = RayBench(tmp_path, request.getfixturevalue("ray_session"))
    else:
        made = _local(request.param, tmp_path)
    yield made
    nothing_is_left(made)


@pytest.fixture(params=["local", "local-watchdog"])
def local_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """For tests of what the local engine alone has."""
    made = _local(request.param, tmp_path)
    yield made
    nothing_is_left(made)


@pytest.fixture
def ray_bench(ray_session: Session, tmp_path: Path) -> Iterator[RayBench]:
    """For tests of what the Ray engine alone has."""
    made = RayBench(tmp_path, ray_session)
    yield made
    nothing_is_left(made)


def _local(name: str, folder: Path) -> Bench:
    """The best that this machine allows, or what is left to a user who may set up nothing."""
    return Bench(folder, "watchdog", "copy") if name == "local-watchdog" else Bench(folder)


def nothing_is_left(bench: Bench) -> None:
    bench.close()
    end = time.monotonic() + LIMIT_S
    while bench.left() and time.monotonic() < end:
        bench.sweep()
        time.sleep(0.02)
    assert bench.left() == []
