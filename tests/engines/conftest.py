from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.bench import Bench


@pytest.fixture(params=[None, "watchdog"], ids=["local", "local-watchdog"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """Every test says what each engine promises, and leaves nothing behind."""
    made = Bench(tmp_path, request.param)
    yield made
    end = time.monotonic() + 10
    while made.left() and time.monotonic() < end:
        time.sleep(0.02)
    assert made.left() == []
