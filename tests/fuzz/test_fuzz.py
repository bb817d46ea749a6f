"""Short runs of the fuzzing: one with a fixed seed, and one with a new seed each time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fuzz.fuzz import STREAMS, fuzz

REQUESTS = 200


@pytest.mark.parametrize("seed", [7, None], ids=["fixed", "random"])
def test_nothing_that_is_sent_breaks_the_operator(tmp_path: Path, seed: int | None) -> None:
    chosen = random.randrange(2**31) if seed is None else seed
    print(f"seed {chosen}")  # pytest shows it when the test fails
    report = fuzz(tmp_path, requests=REQUESTS, seed=chosen)
    assert report.requests >= REQUESTS * sum(share for share, _ in STREAMS.values()) - len(STREAMS)
    assert {stream for stream, _ in report.answers} >= {*STREAMS, "schema"}
