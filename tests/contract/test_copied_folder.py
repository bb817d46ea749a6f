"""A copy of a data folder that is started on the same machine leaves the original's jobs alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from operator_harness import PROBE, Operator, operator, probe_yaml, processes_with, until

SLEEP = {"do": "sleep", "s": 300}
SPAWN = """
    def spawn(self, config):
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        print("asleep", child.pid, flush=True)
        time.sleep(300)
"""


@contextmanager
def copied(own_operator: Operator, tmp_path: Path) -> Iterator[Operator]:
    """An operator on a copy of another's folder, which goes on too."""
    own_operator.kill()  # or its database would be copied while it is written
    subprocess.run(["cp", "-a", own_operator.data_dir, tmp_path / "copy"], check=True)
    own_operator.start()
    other = Operator(tmp_path / "other", "--grace", "1", data_dir=tmp_path / "copy")
    other.folder.mkdir()
    other.start()
    try:
        yield other
    finally:
        other.http.close()
        assert other.stop() == 0
        until(lambda: not processes_with(str(other.data_dir)), "all processes of the copy gone")
        assert "Traceback" not in other.log.read_text()


def _workers(job: dict[str, str]) -> list[int]:
    return sorted(processes_with(f"CORTEX_JOB_ID={job['job_id']}"))


def test_a_stop_at_a_copy_does_not_stop_the_original_s_job(
    own_operator: Operator, tmp_path: Path
) -> None:
    path = own_operator.deployed(probe_yaml(), {"probe.py": PROBE + SPAWN}).removeprefix(
        own_operator.url
    )
    done = own_operator.submit(own_operator.url + path)
    own_operator.finished(own_operator.url + path, done)
    job = own_operator.submit(own_operator.url + path, config={"do": "spawn"})
    own_operator.await_log(own_operator.url + path, job, "asleep")
    processes = _workers(job)
    assert len(processes) == 2
    with copied(own_operator, tmp_path) as copy:
        told = copy.finished(copy.url + path, job)
        assert told["status"] == "status_unexpected_error"
        assert "this one is a copy" in told["message"]
        assert copy.finished(copy.url + path, done)["status"] == "status_succeeded"
        assert copy.delete(copy.url + path, job).status_code in (200, 409)
        assert copy.http.delete(f"{copy.url}/-/apis/probe").status_code == 200
    assert _workers(job) == processes
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"
    assert own_operator.delete(own_operator.url + path, job).status_code == 200
    until(lambda: not _workers(job), "the job gone")
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_stopped"


def test_an_attempt_that_a_copy_loses_takes_nothing_of_the_original_s_along(
    own_operator: Operator, tmp_path: Path
) -> None:
    yaml = probe_yaml(more="  retries: 1\n")
    path = own_operator.deployed(yaml, {"probe.py": PROBE + SPAWN}).removeprefix(own_operator.url)
    job = own_operator.submit(own_operator.url + path, config={"do": "spawn"})
    own_operator.await_log(own_operator.url + path, job, "asleep")
    processes = _workers(job)
    with copied(own_operator, tmp_path) as copy:
        until(lambda: copy.log_of(copy.url + path, job).count("asleep") == 2, "tried again there")
        theirs = set(_workers(job)) - set(processes)
        (worker,) = (pid for pid in theirs if _parent(pid) not in theirs and _parent(pid) != 1)
        os.kill(_parent(worker), 9)  # its supervisor
        assert copy.finished(copy.url + path, job)["status"] == "status_unexpected_error"
        until(lambda: _workers(job) == processes, "what the copy's attempt left is gone")
        assert copy.http.delete(f"{copy.url}/-/apis/probe").status_code == 200
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"


def test_a_folder_that_was_moved_is_the_same(tmp_path: Path) -> None:
    with operator(tmp_path) as own_operator:
        path = own_operator.deployed(probe_yaml(), {"probe.py": PROBE}).removeprefix(
            own_operator.url
        )
        job = own_operator.submit(own_operator.url + path, config=SLEEP)
        own_operator.await_log(own_operator.url + path, job, "asleep")
        own_operator.kill()
        own_operator.data_dir = own_operator.data_dir.rename(tmp_path / "moved")
        own_operator.start()
        assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"
        assert own_operator.delete(own_operator.url + path, job).status_code == 200
        until(lambda: not _workers(job), "the job gone")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
