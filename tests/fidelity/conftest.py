from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fidelity.harness import Runner


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    """One engine for all programs of a test process. Its folder has a short name:
    multiprocessing makes sockets below it, and the path of a socket has at most 107 characters."""
    yield from _open_runner(None)


@pytest.fixture(scope="session")
def copying_runner() -> Iterator[Runner]:
    """The same, as on a machine without overlays: each job has a copy of its project."""
    yield from _open_runner("copy")


def _open_runner(own_folder: str | None) -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(prefix="fidelity") as name:
        runner = Runner(Path(name), own_folder)
        try:
            yield runner
        finally:
            runner.close()
