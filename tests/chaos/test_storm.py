"""Short runs of the fault injection: one with a fixed seed, and one with a new seed each time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from chaos.storm import storm

MAX_TIMEOUT_S = 4  # a run waits for the last timeout


@pytest.mark.parametrize("seed", [7, None], ids=["fixed", "random"])
def test_nothing_is_lost_whatever_is_killed(tmp_path: Path, seed: int | None) -> None:
    chosen = random.randrange(2**31) if seed is None else seed
    print(f"seed {chosen}")  # pytest shows it when the test fails
    storm(tmp_path, jobs=40, kills=12, seed=chosen, max_timeout_s=MAX_TIMEOUT_S)


def test_nothing_is_lost_where_the_database_is_killed_too(tmp_path: Path) -> None:
    run = storm(
        tmp_path, jobs=30, kills=12, seed=11, store="postgresql", max_timeout_s=MAX_TIMEOUT_S
    )
    assert run.kills["database"] == 2


def test_nothing_is_lost_whichever_of_several_operators_is_killed(tmp_path: Path) -> None:
    run = storm(
        tmp_path,
        jobs=20,
        kills=12,
        seed=5,
        store="postgresql",
        operator_count=3,
        max_timeout_s=MAX_TIMEOUT_S,
    )
    assert run.kills["operator"]
    assert run.freezes["operator"]
