"""Short runs of hostile jobs: one with a fixed seed, and one with a new seed each time."""

from __future__ import annotations

import random

import pytest

from chaos.hostile import run_hostile_jobs, traversable_folder


@pytest.mark.parametrize("seed", [3, None], ids=["fixed", "random"])
def test_hostile_jobs_harm_nobody(seed: int | None) -> None:
    chosen = random.randrange(2**31) if seed is None else seed
    print(f"seed {chosen}")  # pytest shows it when the test fails
    with traversable_folder() as folder:
        run_hostile_jobs(folder, hostile=25, honest=25, seed=chosen)
