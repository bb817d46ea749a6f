"""A short run of hostile jobs: one fixed seed, and one of its own each time."""

from __future__ import annotations

import random

import pytest

from chaos.hostile import battle, room


@pytest.mark.parametrize("seed", [3, None], ids=["fixed", "random"])
def test_hostile_jobs_harm_nobody(seed: int | None) -> None:
    chosen = random.randrange(2**31) if seed is None else seed
    print(f"seed {chosen}")  # pytest shows it when the test fails
    with room() as folder:
        battle(folder, hostile=25, honest=25, seed=chosen)
