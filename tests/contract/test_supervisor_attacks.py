"""Stops and timeouts take effect although a job attacks its supervisor or its fork server.

They also take effect where no process reaps zombies.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex.worker import processes
from hostile_jobs import (
    SIGNALS_AFTER_HIDING,
    deploy_hostile,
    living_processes,
    process_state,
    start_attack,
    supervisor_of,
    warm_up,
)
from operator_harness import PROBE, Operator, operator, probe_yaml, until

# Like a container whose first process is a shell: a subreaper that never waits for its children.
REAPS_NOTHING = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1)
child = subprocess.Popen(sys.argv[1:])
time.sleep(600)
"""

BLOCKING_ATTACKS = ["stop_supervisor", "stop_supervisor_repeatedly", "trace_supervisor"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, str]]:
    """An operator with an API of hostile jobs, and the path of the API."""
    with operator(tmp_path_factory.mktemp("hostile")) as running:
        yield running, warm_up(running, deploy_hostile(running))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def parent(pid: int) -> int:
    about = processes.stat(pid)
    assert about is not None
    return about[1]


def is_idle(running: Operator) -> bool:
    before = cpu_s(running.process.pid)
    time.sleep(2)
    return cpu_s(running.process.pid) - before < 0.4


def test_a_zombie_supervisor_counts_as_dead(tmp_path: Path) -> None:
    command_prefix = [sys.executable, "-c", REAPS_NOTHING]
    with operator(tmp_path, command_prefix=command_prefix) as running:
        non_reaper = running.process
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint, config={"do": "sleep", "s": 600}, timeout=600)
        running.await_log(endpoint, job, "asleep")
        supervisor = supervisor_of(running, job)
        try:
            os.kill(processes.children(non_reaper.pid)[0], signal.SIGKILL)
            until(lambda: parent(supervisor) == non_reaper.pid, "the supervisor is inherited")
            os.kill(supervisor, signal.SIGKILL)
            until(lambda: process_state(supervisor) == "Z", "the supervisor is a zombie")
            running.command_prefix = []
            path = endpoint.removeprefix(running.url)
            running.start()
            status = running.finished(running.url + path, job)
            assert status["status"] == "status_unexpected_error"
            assert "supervisor was killed" in status["message"]
            assert process_state(supervisor) == "Z"
            until(lambda: is_idle(running), "the operator is idle")
        finally:
            non_reaper.kill()
            non_reaper.wait()


@pytest.mark.parametrize("what", BLOCKING_ATTACKS)
def test_a_timeout_holds_although_the_job_blocks_its_supervisor(
    hostile: tuple[Operator, str], what: str
) -> None:
    running, path = hostile
    job = start_attack(running, path, what, timeout=10)
    status = running.finished(running.url + path, job)
    assert (status["status"], status["message"]) == ("status_timed_out", "timeout of 10 s passed")
    assert living_processes(running, path, job) == []


@pytest.mark.parametrize("what", BLOCKING_ATTACKS)
def test_a_stop_takes_effect_although_the_job_blocks_its_supervisor(
    hostile: tuple[Operator, str], what: str
) -> None:
    running, path = hostile
    job = start_attack(running, path, what)
    running.delete(running.url + path, job)
    until(
        lambda: living_processes(running, path, job) == [], "all processes of the job have exited"
    )
    assert running.finished(running.url + path, job)["status"] == "status_stopped"


def test_a_job_that_kills_its_supervisor_after_its_deadline_has_timed_out(
    hostile: tuple[Operator, str],
) -> None:
    running, path = hostile
    job = start_attack(running, path, "kill_supervisor_on_sigterm", timeout=10)
    assert running.finished(running.url + path, job)["status"] == "status_timed_out"
    assert living_processes(running, path, job) == []


def test_the_next_operator_enforces_a_blocked_supervisors_timeout(tmp_path: Path) -> None:
    with operator(tmp_path) as running:
        path = warm_up(running, deploy_hostile(running))
        job = start_attack(running, path, "stop_supervisor_repeatedly", timeout=10)
        running.kill()
        running.start()
        status = running.finished(running.url + path, job)
        assert (status["status"], status["message"]) == (
            "status_timed_out",
            "timeout of 10 s passed",
        )
        assert living_processes(running, path, job) == []


def test_a_stopped_supervisor_is_continued(hostile: tuple[Operator, str], tmp_path: Path) -> None:
    """Only the supervisor can report the end of its job, whichever process stopped it."""
    running, _ = hostile
    endpoint = running.deployed(probe_yaml("honest"), {"probe.py": PROBE})
    go = tmp_path / "go"
    job = running.submit(endpoint, config={"do": "say", "go": str(go)})
    running.await_log(endpoint, job, "line 0")
    os.kill(supervisor_of(running, job), signal.SIGSTOP)
    go.touch()
    assert running.finished(endpoint, job)["status"] == "status_succeeded"


@pytest.mark.parametrize("how", SIGNALS_AFTER_HIDING)
def test_processes_hidden_from_all_relatives_are_ended(
    hostile: tuple[Operator, str], tmp_path: Path, how: str
) -> None:
    """Hidden processes have no death signal, session or environment of their job.

    The job has killed or stopped its supervisor and its fork server, which would find them.
    Meanwhile an honest job of the same fork server continues.
    """
    running, _ = hostile
    name = f"hides-{how.replace(' ', '-')}"
    path = deploy_hostile(running, name=name, more="  retries: 1\n")
    honest = running.submit(running.url + path, config={"do": "wait", "go": str(tmp_path / "go")})
    running.await_log(running.url + path, honest, "ready")
    file = tmp_path / "hidden"
    config = {"do": "hide", "file": str(file), "signals": SIGNALS_AFTER_HIDING[how]}
    job = running.submit(running.url + path, config=config)
    status = running.finished(running.url + path, job)
    assert status["status"] == "status_succeeded", status
    assert status["result"] == [], "processes of the first attempt beside the second attempt"
    assert len(file.read_text().split()) > 3
    (tmp_path / "go").touch()
    assert running.finished(running.url + path, honest)["status"] == "status_succeeded"
    until(lambda: not zombies(running), "all inherited processes are reaped")


def zombies(running: Operator) -> list[int]:
    return [pid for pid in processes.children(running.process.pid) if process_state(pid) == "Z"]


def test_inherited_supervisors_outlive_the_operator(tmp_path: Path) -> None:
    with operator(tmp_path) as running:
        path = deploy_hostile(running)
        go = tmp_path / "go"
        job = running.submit(running.url + path, config={"do": "wait", "go": str(go)})
        running.await_log(running.url + path, job, "ready")
        supervisor = supervisor_of(running, job)
        os.kill(parent(supervisor), signal.SIGKILL)
        until(
            lambda: parent(supervisor) == running.process.pid,
            "the operator inherits the supervisor",
        )
        running.stop()
        assert processes.ticks_if_alive(supervisor) is not None
        running.start()
        go.touch()
        assert running.finished(running.url + path, job)["status"] == "status_succeeded"


@pytest.mark.parametrize("what", ["stop_server", "stop_server_repeatedly", "trace_server"])
def test_a_fork_server_that_a_job_blocks_is_replaced(
    hostile: tuple[Operator, str], what: str
) -> None:
    running, _ = hostile
    path = deploy_hostile(running, name=what.replace("_", "-"))
    job = start_attack(running, path, what)
    go = running.folder / f"{what}.go"
    others = [
        running.submit(running.url + path, config={"do": "wait", "go": str(go)}) for _ in range(3)
    ]

    def words(other: Any) -> str:
        return str(running.status(running.url + path, other).get("message"))

    def runs(other: Any) -> bool:
        counts = running.status(running.url + path, other)["worker_counts"]
        return bool(counts["running"])

    def is_blocked(other: Any) -> bool:
        return "fork server, which" in words(other)

    # The next poll continues a stopped server, perhaps before the status shows it.
    conditions = [is_blocked] if what == "trace_server" else [is_blocked, runs]
    until(
        lambda: any(condition(each) for each in others for condition in conditions),
        "the status says why the jobs wait",
    )
    go.touch()
    for other in others:
        assert running.finished(running.url + path, other)["status"] == "status_succeeded"
    running.delete(running.url + path, job)
    until(
        lambda: living_processes(running, path, job) == [], "all processes of the job have exited"
    )
