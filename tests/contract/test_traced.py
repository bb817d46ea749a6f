"""With `--run-as`, nothing that the operator does as root goes by a path through a folder that the jobs' user owns: a
link that is put there would lead it anywhere. Told by tracing its system calls.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cortex.worker import processes
from operator_harness import PROBE, Operator, operator, probe_yaml, processes_with, reachable, until
from root_operator import UID, USER, passable_folder, waiting_for_import
from syscall_trace import COMMAND, Seen, Trace

KEPT_DAYS = str(1 / 86_400)
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
    """Of an operator; one for each time that it was started."""

    def __init__(self, folder: Path) -> None:
        self.seen = Seen()
        self._folder = folder
        self._number = 0

    def command(self) -> list[str]:
        """What an operator is started with next."""
        self._number += 1
        return [*reachable(), *COMMAND, "-o", f"{self._folder}/trace.{self._number}"]

    def read(self) -> None:
        """Read what was traced, once all of it has ended."""
        until(lambda: not processes_with(f"{self._folder}/trace."), "the traces complete")
        for number in range(1, self._number + 1):
            text = (self._folder / f"trace.{number}").read_text("utf-8", "replace")
            Trace(UID, str(Path.cwd()), self.seen).read(text.splitlines())


@contextmanager
def traced(*options: str) -> Iterator[tuple[Operator, Traces]]:
    with passable_folder() as folder:
        (folder / "files").mkdir()
        traces = Traces(folder)
        options = ("--run-as", USER, "--cpu", "2", "--files", f"file://{folder}/files", *options)
        with operator(folder, *options, within=traces.command()) as running:
            yield running, traces
        traces.read()


def started_again(running: Operator, traces: Traces) -> None:
    running.within = traces.command()
    running.start()


def parent(pid: int) -> int:
    """0 where the process is gone."""
    about = processes.stat(pid)
    return 0 if about is None else about[1]


def kill(pid: int) -> None:
    """SIGKILL, unless it is gone already."""
    if pid > 0:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def fork_servers(running: Operator) -> list[int]:
    found = processes_with(str(running.data_dir))
    return [pid for pid in found if parent(pid) == running.process.pid]


def a_day_of(running: Operator, traces: Traces) -> list[str]:
    """Whatever an operator does for jobs, with their folders; the ids of all jobs."""
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

    going_on = running.submit(endpoint, config={"do": "sleep", "s": 4})
    running.await_log(endpoint, going_on, "asleep")
    running.kill()
    started_again(running, traces)
    endpoint = f"{running.url}/probe"
    assert running.finished(endpoint, going_on)["status"] == "status_succeeded"

    planter = running.deployed(probe_yaml("planter"), {"probe.py": PLANTER})
    planted = running.submit(planter)
    assert running.finished(planter, planted)["status"] == "status_worker_error"
    assert "root:" not in running.log_of(planter, planted)

    # Killed before it gave the order to anybody: the attempt is fenced off, and begins anew.
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

    jobs += [failed, stopped, lost, going_on, planted, waiting, ran, unbuilt]
    return [job["job_id"] for job in jobs]


@pytest.fixture(scope="module")
def seen() -> Seen:
    with traced() as (running, traces):
        ids = a_day_of(running, traces)
        jobs = running.data_dir / "jobs"
        running.kill()
        running.options = (*running.options, "--keep-jobs", KEPT_DAYS)
        started_again(running, traces)
        until(lambda: not [job for job in ids if (jobs / job).exists()], "all jobs removed")
        for api in running.http.get(f"{running.url}/-/apis").json():
            running.http.delete(f"{running.url}/-/apis/{api['spec']['name']}")
        until(
            lambda: not list((running.data_dir / "environments").glob("[0-9a-f]*")),
            "all environments removed",
        )
    # But that of the job whose environment could not be built: it never had a folder to write in.
    assert {f"{jobs}/{job}" for job in ids[:-1]} <= traces.seen.given
    return traces.seen


def is_about_builds(line: str) -> bool:
    return "/data/environments/" in line


def test_nothing_of_jobs_is_done_by_a_path_through_a_folder_of_their_user(seen: Seen) -> None:
    assert [line for line in seen.wrong if not is_about_builds(line)] == []
    # It was seen at all, and does what it has to there.
    assert seen.calls[0] > 1000
    assert seen.calls[UID] > 1000
    in_folders_of_jobs = {call for call, folder in seen.right if "/data/jobs/0" in folder}
    assert in_folders_of_jobs >= {"openat", "newfstatat", "linkat", "renameat", "unlinkat"}
    assert ("openat", next(path for path in seen.given if path.endswith("/.own"))) in seen.right


def test_nothing_of_builds_is_done_by_a_path_through_a_folder_of_their_user(seen: Seen) -> None:
    assert [line for line in seen.wrong if is_about_builds(line)] == []
    assert [folder for _, folder in seen.right if "/data/environments/" in folder]
