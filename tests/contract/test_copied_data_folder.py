"""An operator on a copied data folder does not touch the jobs of the original operator."""

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
def operator_on_copy(own_operator: Operator, tmp_path: Path) -> Iterator[Operator]:
    """An operator on a copy of the data folder, beside the original operator."""
    own_operator.kill()  # otherwise the database would be copied during a write
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
        until(
            lambda: not processes_with(str(other.data_dir)), "all processes of the copy have exited"
        )
        assert "Traceback" not in other.log.read_text()


def _processes_of(job: dict[str, str]) -> list[int]:
    return sorted(processes_with(f"CORTEX_JOB_ID={job['job_id']}"))


def test_a_stop_at_a_copy_does_not_stop_the_job_of_the_original(
    own_operator: Operator, tmp_path: Path
) -> None:
    path = own_operator.deployed(probe_yaml(), {"probe.py": PROBE + SPAWN}).removeprefix(
        own_operator.url
    )
    done = own_operator.submit(own_operator.url + path)
    own_operator.finished(own_operator.url + path, done)
    job = own_operator.submit(own_operator.url + path, config={"do": "spawn"})
    own_operator.await_log(own_operator.url + path, job, "asleep")
    processes = _processes_of(job)
    assert len(processes) == 2
    with operator_on_copy(own_operator, tmp_path) as copy:
        ended = copy.finished(copy.url + path, job)
        assert ended["status"] == "status_unexpected_error"
        assert "this one is a copy" in ended["message"]
        assert copy.finished(copy.url + path, done)["status"] == "status_succeeded"
        assert copy.delete(copy.url + path, job).status_code in (200, 409)
        assert copy.http.delete(f"{copy.url}/-/apis/probe").status_code == 200
    assert _processes_of(job) == processes
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"
    assert own_operator.delete(own_operator.url + path, job).status_code == 200
    until(lambda: not _processes_of(job), "the job's processes have exited")
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_stopped"


def test_a_lost_attempt_at_a_copy_kills_no_process_of_the_original(
    own_operator: Operator, tmp_path: Path
) -> None:
    yaml = probe_yaml(more="  retries: 1\n")
    path = own_operator.deployed(yaml, {"probe.py": PROBE + SPAWN}).removeprefix(own_operator.url)
    job = own_operator.submit(own_operator.url + path, config={"do": "spawn"})
    own_operator.await_log(own_operator.url + path, job, "asleep")
    processes = _processes_of(job)
    with operator_on_copy(own_operator, tmp_path) as copy:
        until(
            lambda: copy.log_of(copy.url + path, job).count("asleep") == 2,
            "the copy retries the job",
        )
        theirs = set(_processes_of(job)) - set(processes)
        (worker,) = (pid for pid in theirs if _parent(pid) not in theirs and _parent(pid) != 1)
        os.kill(_parent(worker), 9)  # its supervisor
        assert copy.finished(copy.url + path, job)["status"] == "status_unexpected_error"
        until(
            lambda: _processes_of(job) == processes,
            "the processes of the copy's attempt have exited",
        )
        assert copy.http.delete(f"{copy.url}/-/apis/probe").status_code == 200
    assert own_operator.status(own_operator.url + path, job)["status"] == "status_running"


def test_a_moved_data_folder_keeps_its_running_job(tmp_path: Path) -> None:
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
        until(lambda: not _processes_of(job), "the job's processes have exited")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
