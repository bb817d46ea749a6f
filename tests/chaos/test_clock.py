"""A wall clock that jumps, back and forth, under an operator with jobs: statuses stay right, times in
order, timeouts as long as they are. The clock is libfaketime's (Debian's package faketime).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from operator_harness import PROBE, Operator, operator, probe_yaml, until

LIBRARY = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
SLEEP = {"do": "sleep", "s": 300}
HOUR = 3600


class Clock:
    """The operator's: its offset lies in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set(0)

    def set(self, offset_s: int) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(f"{offset_s:+d}\n")
        part.rename(self.file)

    def command(self) -> list[str]:
        return [
            "env",
            f"LD_PRELOAD={LIBRARY[0]}",
            f"FAKETIME_TIMESTAMP_FILE={self.file}",
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
        ]


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    assert LIBRARY, "libfaketime is missing: `make setup` installs it"
    return Clock(tmp_path / "clock")


@pytest.fixture
def jumpy(tmp_path: Path, clock: Clock) -> Iterator[Operator]:
    with operator(tmp_path, "--cpu", "0.001", within=clock.command()) as running:
        yield running


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_no_jump_of_the_clock_makes_a_status_or_a_timeout_wrong(
    jumpy: Operator, clock: Clock, jump: int
) -> None:
    endpoint = jumpy.deployed(probe_yaml(), {"probe.py": PROBE})
    before = jumpy.run(endpoint)
    # One that runs and two that wait behind it: the only core is taken.
    runs = jumpy.submit(endpoint, config=SLEEP, timeout=20)
    jumpy.await_log(endpoint, runs, "asleep")
    start = time.monotonic()
    overdue = jumpy.submit(endpoint, timeout=3)
    patient = jumpy.submit(endpoint, config={"do": "say"}, timeout=600)
    clock.set(jump)
    after = jumpy.submit(endpoint, timeout=600)
    assert (after["created_time"] < patient["created_time"]) == (jump < 0), "the clock did jump"
    time.sleep(max(0.0, start + 1 - time.monotonic()))
    is_running = jumpy.status(endpoint, overdue)["status"] == "status_running"
    assert is_running or time.monotonic() - start >= 3
    for job in (runs, patient, after):
        assert jumpy.status(endpoint, job)["status"] == "status_running"
    ends = [jumpy.finished(endpoint, job) for job in (overdue, runs, patient, after)]
    assert [end["status"] for end in ends] == [
        "status_timed_out", "status_timed_out", "status_succeeded", "status_succeeded",
    ]  # fmt: skip
    assert time.monotonic() - start < HOUR, "no timeout was an hour longer"
    for end in (before, *ends):
        assert end["created_time"] <= end["start_time"] <= end["end_time"]
    # Newest first is by submission, whatever the clock said.
    listed = [job["job_id"] for job in jumpy.http.get(endpoint).json()["job_statuses"]]
    assert listed == [j["job_id"] for j in (after, patient, overdue, runs, before)]
    assert jumpy.status(endpoint, before) == before


def test_a_clock_that_is_set_back_while_no_operator_runs(jumpy: Operator, clock: Clock) -> None:
    endpoint = jumpy.deployed(probe_yaml(), {"probe.py": PROBE})
    job = jumpy.submit(endpoint, config=SLEEP)
    jumpy.await_log(endpoint, job, "asleep")
    waiting = jumpy.submit(endpoint)
    jumpy.kill()
    clock.set(-HOUR)
    jumpy.start()
    endpoint = f"{jumpy.url}/probe"
    # That it has started may not have been stored when the operator was killed.
    until(
        lambda: jumpy.status(endpoint, job)["worker_counts"] == {"pending": 0, "running": 1},
        "it is seen to run",
    )
    assert jumpy.delete(endpoint, job).status_code == 200
    ends = [jumpy.finished(endpoint, each) for each in (job, waiting)]
    assert [end["status"] for end in ends] == ["status_stopped", "status_succeeded"]
    for end in ends:
        assert end["created_time"] <= end["start_time"] <= end["end_time"]
    until(lambda: jumpy.http.get(f"{jumpy.url}/readyz").status_code == 200, "ready")
