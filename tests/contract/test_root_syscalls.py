"""With `--run-as`, root uses no path through a folder of the jobs' user.

A link in such a folder could lead root anywhere. The tests trace the operator's system calls.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cortex.worker import processes
from operator_harness import (
    PROBE,
    Operator,
    operator,
    probe_yaml,
    processes_with,
    reachable_interpreter,
    until,
)
from root_operator import UID, USER, passable_folder, waiting_for_import
from syscall_trace import COMMAND, Findings, Trace

ONE_SECOND_IN_DAYS = str(1 / 86_400)
PACKAGE = {
    "requirements.txt": "./made\n",
    "made/setup.py": "import os; from setuptools import setup; os.symlink('/etc', f'link{os.getpid()}'); setup()",
    "made/pyproject.toml": '[project]\nname = "made"\nversion = "1"\n'
    '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    "[tool.setuptools]\npackages = []\n",
}
PLANTER = """
import os
def task(config):
    os.makedirs("made/closed/deep")
    os.chmod("made/closed", 0)
    folder = os.path.dirname(os.environ["CORTEX_JOB_SPEC"])
    os.symlink("/etc", folder + "/files/link")
    os.makedirs(folder + "/files/" + "/".join(["deep"] * 100))
    os.unlink(folder + "/log")
    os.symlink("/etc/shadow", folder + "/log")
    raise ValueError("planted")
"""


class Traces:
    """The traces of an operator, one for each start."""

    def __init__(self, folder: Path) -> None:
        self.findings = Findings()
        self._folder = folder
        self._number = 0

    def command(self) -> list[str]:
        """The command prefix of the operator's next start."""
        self._number += 1
        return [*reachable_interpreter(), *COMMAND, "-o", f"{self._folder}/trace.{self._number}"]

    def read(self) -> None:
        """Wait until all traced processes have exited, and read the traces."""
        until(lambda: not processes_with(f"{self._folder}/trace."), "the traces complete")
        for number in range(1, self._number + 1):
            text = (self._folder / f"trace.{number}").read_text("utf-8", "replace")
            Trace(UID, str(Path.cwd()), self.findings).read(text.splitlines())


@contextmanager
def traced(*options: str) -> Iterator[tuple[Operator, Traces]]:
    with passable_folder() as folder:
        (folder / "files").mkdir()
        traces = Traces(folder)
        options = ("--run-as", USER, "--cpu", "2", "--files", f"file://{folder}/files", *options)
        with operator(folder, *options, command_prefix=traces.command()) as running:
            yield running, traces
        traces.read()


def restart(running: Operator, traces: Traces) -> None:
    running.command_prefix = traces.command()
    running.start()


def parent(pid: int) -> int:
    """The parent of a process; 0 if the process has exited."""
    about = processes.stat(pid)
    return 0 if about is None else about[1]


def kill(pid: int) -> None:
    """Send SIGKILL to a process that may have exited."""
    if pid > 0:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def fork_servers(running: Operator) -> list[int]:
    found = processes_with(str(running.data_dir))
    return [pid for pid in found if parent(pid) == running.process.pid]


def run_all_kinds_of_jobs(running: Operator, traces: Traces) -> list[str]:
    """Let the operator do everything that it does with folders of jobs; the ids of all jobs."""
    endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
    jobs = [running.submit(endpoint, config={"do": "say", "lines": 2}) for _ in range(8)]
    for job in jobs:
        assert running.finished(endpoint, job)["status"] == "status_succeeded"
        assert running.log_of(endpoint, job) == "line 0\nline 1\n"

    failed = running.submit(endpoint, config={"do": "fail", "message": "no"})
    assert running.finished(endpoint, failed)["status"] == "status_worker_error"
    stopped = running.submit(endpoint, config={"do": "stubborn"})
    running.await_log(endpoint, stopped, "asleep")
    running.delete(endpoint, stopped)
    followed = {"Accept": "text/event-stream"}
    events = running.http.get(f"{endpoint}/{stopped['job_id']}/logs", headers=followed).text
    assert "asleep" in events
    assert running.finished(endpoint, stopped)["status"] == "status_stopped"

    lost = running.submit(endpoint, config={"do": "stubborn"})
    running.await_log(endpoint, lost, "asleep")
    for pid in processes_with(f"CORTEX_JOB_ID={lost['job_id']}"):
        kill(parent(pid))
    assert running.finished(endpoint, lost)["status"] == "status_unexpected_error"

    continuing = running.submit(endpoint, config={"do": "sleep", "s": 4})
    running.await_log(endpoint, continuing, "asleep")
    running.kill()
    restart(running, traces)
    endpoint = f"{running.url}/probe"
    assert running.finished(endpoint, continuing)["status"] == "status_succeeded"

    planter = running.deployed(probe_yaml("planter"), {"probe.py": PLANTER})
    planted = running.submit(planter)
    assert running.finished(planter, planted)["status"] == "status_worker_error"
    assert "root:" not in running.log_of(planter, planted)

    # The fork server dies with the order: the operator fences the attempt, and retries the job.
    go = running.folder / "go"
    waits, waiting = waiting_for_import(running, go)
    for pid in fork_servers(running):
        kill(pid)
    go.touch()
    assert running.finished(waits, waiting)["status"] == "status_succeeded"
    assert (running.data_dir / "jobs" / waiting["job_id"]).is_dir()

    built = running.deployed(probe_yaml("built"), {"probe.py": PROBE, **PACKAGE})
    ran = running.submit(built)
    assert running.finished(built, ran)["status"] == "status_succeeded", running.log_of(built, ran)

    broken = running.deployed(probe_yaml("broken"), {"probe.py": PROBE, "requirements.txt": "./no"})
    unbuilt = running.submit(broken)
    assert running.finished(broken, unbuilt)["status"] == "status_unexpected_error"
    assert running.log_of(broken, unbuilt) != ""

    jobs += [failed, stopped, lost, continuing, planted, waiting, ran, unbuilt]
    return [job["job_id"] for job in jobs]


@pytest.fixture(scope="module")
def findings() -> Findings:
    with traced() as (running, traces):
        ids = run_all_kinds_of_jobs(running, traces)
        jobs = running.data_dir / "jobs"
        running.kill()
        running.options = (*running.options, "--keep-jobs", ONE_SECOND_IN_DAYS)
        restart(running, traces)
        until(lambda: not [job for job in ids if (jobs / job).exists()], "all jobs removed")
        for api in running.http.get(f"{running.url}/-/apis").json():
            running.http.delete(f"{running.url}/-/apis/{api['spec']['name']}")
        until(
            lambda: not list((running.data_dir / "environments").glob("[0-9a-f]*")),
            "all environments removed",
        )
    # Except the folder of the job whose environment could not be built: that job never ran.
    assert {f"{jobs}/{job}" for job in ids[:-1]} <= traces.findings.given
    return traces.findings


def is_about_builds(line: str) -> bool:
    return "/data/environments/" in line


def test_root_uses_no_path_through_folders_of_the_jobs_user_for_jobs(findings: Findings) -> None:
    assert [line for line in findings.wrong if not is_about_builds(line)] == []
    # The trace is complete: both users and the expected calls are in it.
    assert findings.calls[0] > 1000
    assert findings.calls[UID] > 1000
    in_folders_of_jobs = {call for call, folder in findings.right if "/data/jobs/0" in folder}
    assert in_folders_of_jobs >= {"openat", "newfstatat", "linkat", "renameat", "unlinkat"}
    assert (
        "openat",
        next(path for path in findings.given if path.endswith("/.own")),
    ) in findings.right


def test_root_uses_no_path_through_folders_of_the_jobs_user_for_builds(findings: Findings) -> None:
    assert [line for line in findings.wrong if is_about_builds(line)] == []
    assert [folder for _, folder in findings.right if "/data/environments/" in folder]
