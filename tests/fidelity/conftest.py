from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fidelity.harness import Runner


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    """One engine for all programs of a test process. Its folder has a short name: that of a socket below it, as
    multiprocessing makes them, has at most 107 characters."""
    yield from _made(None)


@pytest.fixture(scope="session")
def copying() -> Iterator[Runner]:
    """The same, on a machine that does not let its jobs have an overlay: they have copies of their projects."""
    yield from _made("copy")


def _made(own_folder: str | None) -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(prefix="fidelity") as name:
        made = Runner(Path(name), own_folder)
        try:
            yield made
        finally:
            made.close()
