"""A wall clock that jumps back or forward under an operator with jobs. Statuses stay right, times
stay in order, and timeouts keep their length. The clock is libfaketime's (Debian's package
faketime).
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


class FakeClock:
    """The operator's wall clock, whose offset is in a file."""

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
def clock(tmp_path: Path) -> FakeClock:
    assert LIBRARY, "libfaketime is missing: `make setup` installs it"
    return FakeClock(tmp_path / "clock")


@pytest.fixture
def jumping_operator(tmp_path: Path, clock: FakeClock) -> Iterator[Operator]:
    with operator(tmp_path, "--cpu", "0.001", command_prefix=clock.command()) as running:
        yield running


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_no_jump_of_the_clock_makes_a_status_or_a_timeout_wrong(
    jumping_operator: Operator, clock: FakeClock, jump: int
) -> None:
    endpoint = jumping_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    before = jumping_operator.run(endpoint)
    # One job runs and takes the only core; two jobs wait behind it.
    runs = jumping_operator.submit(endpoint, config=SLEEP, timeout=20)
    jumping_operator.await_log(endpoint, runs, "asleep")
    start = time.monotonic()
    overdue = jumping_operator.submit(endpoint, timeout=3)
    patient = jumping_operator.submit(endpoint, config={"do": "say"}, timeout=600)
    clock.set(jump)
    after = jumping_operator.submit(endpoint, timeout=600)
    assert (after["created_time"] < patient["created_time"]) == (jump < 0), "the clock did jump"
    time.sleep(max(0.0, start + 1 - time.monotonic()))
    is_running = jumping_operator.status(endpoint, overdue)["status"] == "status_running"
    assert is_running or time.monotonic() - start >= 3
    for job in (runs, patient, after):
        assert jumping_operator.status(endpoint, job)["status"] == "status_running"
    ends = [jumping_operator.finished(endpoint, job) for job in (overdue, runs, patient, after)]
    assert [end["status"] for end in ends] == [
        "status_timed_out", "status_timed_out", "status_succeeded", "status_succeeded",
    ]  # fmt: skip
    assert time.monotonic() - start < HOUR, "no timeout was an hour longer"
    for end in (before, *ends):
        assert end["created_time"] <= end["start_time"] <= end["end_time"]
    # The list is in the order of the submits, newest first, and not of the clock.
    listed = [job["job_id"] for job in jumping_operator.http.get(endpoint).json()["job_statuses"]]
    assert listed == [j["job_id"] for j in (after, patient, overdue, runs, before)]
    assert jumping_operator.status(endpoint, before) == before


def test_jobs_end_as_they_should_after_the_clock_was_set_back_while_no_operator_ran(
    jumping_operator: Operator, clock: FakeClock
) -> None:
    endpoint = jumping_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = jumping_operator.submit(endpoint, config=SLEEP)
    jumping_operator.await_log(endpoint, job, "asleep")
    waiting = jumping_operator.submit(endpoint)
    jumping_operator.kill()
    clock.set(-HOUR)
    jumping_operator.start()
    endpoint = f"{jumping_operator.url}/probe"
    # The operator may have been killed before it stored the start.
    until(
        lambda: (
            jumping_operator.status(endpoint, job)["worker_counts"] == {"pending": 0, "running": 1}
        ),
        "the new operator shows the job as running",
    )
    assert jumping_operator.delete(endpoint, job).status_code == 200
    ends = [jumping_operator.finished(endpoint, each) for each in (job, waiting)]
    assert [end["status"] for end in ends] == ["status_stopped", "status_succeeded"]
    for end in ends:
        assert end["created_time"] <= end["start_time"] <= end["end_time"]
    until(
        lambda: jumping_operator.http.get(f"{jumping_operator.url}/readyz").status_code == 200,
        "ready",
    )
