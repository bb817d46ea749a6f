"""A short run of the fault injection: one fixed seed, and one of its own each time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from chaos.storm import storm


@pytest.mark.parametrize("seed", [7, None], ids=["fixed", "random"])
def test_nothing_is_lost_whatever_is_killed(tmp_path: Path, seed: int | None) -> None:
    chosen = random.randrange(2**31) if seed is None else seed
    print(f"seed {chosen}")  # pytest shows it when the test fails
    storm(tmp_path, jobs=40, kills=12, seed=chosen)
