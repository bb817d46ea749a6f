"""Stop means gone, and timeout means over: also where a job turns on the processes that watch over it, and where
nobody collects what has ended."""

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
from hostile_jobs import HIDES, begun, deployed, left, state, supervisor_of, warmed_up
from operator_harness import PROBE, Operator, operator, probe_yaml, until

# As a container whose first process is a shell: it inherits whatever is left, and waits for none of it.
COLLECTS_NOTHING = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1)
child = subprocess.Popen(sys.argv[1:])
time.sleep(600)
"""

HOLDS_UP = ["stop_it", "stop_it_again_and_again", "trace_it"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, str]]:
    """An operator with an API of hostile jobs, and the path of that."""
    with operator(tmp_path_factory.mktemp("hostile")) as running:
        yield running, warmed_up(running, deployed(running))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_idle(running: Operator) -> bool:
    before = cpu_s(running.process.pid)
    time.sleep(2)
    return cpu_s(running.process.pid) - before < 0.4


def test_a_supervising_process_that_nobody_collects_is_dead(tmp_path: Path) -> None:
    within = [sys.executable, "-c", COLLECTS_NOTHING]
    with operator(tmp_path, within=within) as running:
        collects_nothing = running.process
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint, config={"do": "sleep", "s": 600}, timeout=600)
        running.await_log(endpoint, job, "asleep")
        supervisor = supervisor_of(running, job)
        try:
            os.kill(processes.children(collects_nothing.pid)[0], signal.SIGKILL)
            until(lambda: processes.stat(supervisor)[1] == collects_nothing.pid, "left behind")  # type: ignore[index]
            os.kill(supervisor, signal.SIGKILL)
            until(lambda: state(supervisor) == "Z", "a zombie")
            running.within = []
            path = endpoint.removeprefix(running.url)
            running.start()
            status = running.finished(running.url + path, job)
            assert status["status"] == "status_unexpected_error"
            assert "supervisor was killed" in status["message"]
            assert state(supervisor) == "Z"
            until(lambda: is_idle(running), "it has nothing to do")
        finally:
            collects_nothing.kill()
            collects_nothing.wait()


@pytest.mark.parametrize("what", HOLDS_UP)
def test_a_timeout_is_kept_although_the_job_holds_up_its_supervisor(
    hostile: tuple[Operator, str], what: str
) -> None:
    running, path = hostile
    job = begun(running, path, what, timeout=10)
    status = running.finished(running.url + path, job)
    assert (status["status"], status["message"]) == ("status_timed_out", "timeout of 10 s passed")
    assert left(running, path, job) == []


@pytest.mark.parametrize("what", HOLDS_UP)
def test_a_stop_is_carried_out_although_the_job_holds_up_its_supervisor(
    hostile: tuple[Operator, str], what: str
) -> None:
    running, path = hostile
    job = begun(running, path, what)
    running.delete(running.url + path, job)
    until(lambda: left(running, path, job) == [], "all of it gone")
    assert running.finished(running.url + path, job)["status"] == "status_stopped"


def test_a_job_that_kills_its_supervisor_after_its_deadline_has_timed_out(
    hostile: tuple[Operator, str],
) -> None:
    running, path = hostile
    job = begun(running, path, "kill_it_when_asked_to_end", timeout=10)
    assert running.finished(running.url + path, job)["status"] == "status_timed_out"
    assert left(running, path, job) == []


def test_a_timeout_is_kept_by_the_next_operator_too(tmp_path: Path) -> None:
    with operator(tmp_path) as running:
        path = warmed_up(running, deployed(running))
        job = begun(running, path, "stop_it_again_and_again", timeout=10)
        running.kill()
        running.start()
        status = running.finished(running.url + path, job)
        assert (status["status"], status["message"]) == (
            "status_timed_out",
            "timeout of 10 s passed",
        )
        assert left(running, path, job) == []


def test_a_supervising_process_that_was_stopped_goes_on(
    hostile: tuple[Operator, str], tmp_path: Path
) -> None:
    """Whoever has stopped it: without it nobody would learn that its job has ended."""
    running, _ = hostile
    endpoint = running.deployed(probe_yaml("honest"), {"probe.py": PROBE})
    go = tmp_path / "go"
    job = running.submit(endpoint, config={"do": "say", "go": str(go)})
    running.await_log(endpoint, job, "line 0")
    os.kill(supervisor_of(running, job), signal.SIGSTOP)
    go.touch()
    assert running.finished(endpoint, job)["status"] == "status_succeeded"


@pytest.mark.parametrize("how", HIDES)
def test_what_has_hidden_from_all_its_relatives_is_ended(
    hostile: tuple[Operator, str], tmp_path: Path, how: str
) -> None:
    """Without death signal, session and environment, and without those that would find it all the same. Meanwhile an
    honest job of the same fork server goes on."""
    running, _ = hostile
    name = f"hides-{how.replace(' ', '-')}"
    path = deployed(running, name=name, more="  retries: 1\n")
    honest = running.submit(running.url + path, config={"do": "wait", "go": str(tmp_path / "go")})
    running.await_log(running.url + path, honest, "ready")
    file = tmp_path / "hidden"
    config = {"do": "hide", "file": str(file), "signals": HIDES[how]}
    job = running.submit(running.url + path, config=config)
    status = running.finished(running.url + path, job)
    assert status["status"] == "status_succeeded", status
    assert status["result"] == [], "beside the second attempt"
    assert len(file.read_text().split()) > 3
    (tmp_path / "go").touch()
    assert running.finished(running.url + path, honest)["status"] == "status_succeeded"
    until(lambda: not zombies(running), "all that was inherited collected")


def zombies(running: Operator) -> list[int]:
    return [pid for pid in processes.children(running.process.pid) if state(pid) == "Z"]


def test_supervising_processes_that_the_operator_inherited_outlive_it(tmp_path: Path) -> None:
    with operator(tmp_path) as running:
        path = deployed(running)
        go = tmp_path / "go"
        job = running.submit(running.url + path, config={"do": "wait", "go": str(go)})
        running.await_log(running.url + path, job, "ready")
        supervisor = supervisor_of(running, job)
        [server] = [processes.stat(supervisor)[1]]  # type: ignore[index]
        os.kill(server, signal.SIGKILL)

        def parent() -> int:
            about = processes.stat(supervisor)
            assert about is not None
            return about[1]

        until(lambda: parent() == running.process.pid, "inherited")
        running.stop()
        assert processes.ticks_if_alive(supervisor) is not None
        running.start()
        go.touch()
        assert running.finished(running.url + path, job)["status"] == "status_succeeded"


@pytest.mark.parametrize("what", ["stop_server", "stop_server_again_and_again", "trace_server"])
def test_a_fork_server_that_a_job_holds_up_is_noticed_and_replaced(
    hostile: tuple[Operator, str], what: str
) -> None:
    running, _ = hostile
    path = deployed(running, name=what.replace("_", "-"))
    job = begun(running, path, what)
    go = running.folder / f"{what}.go"
    others = [
        running.submit(running.url + path, config={"do": "wait", "go": str(go)}) for _ in range(3)
    ]

    def words(other: Any) -> str:
        return str(running.status(running.url + path, other).get("message"))

    def runs(other: Any) -> bool:
        counts = running.status(running.url + path, other)["worker_counts"]
        return bool(counts["running"])

    def is_held_up(other: Any) -> bool:
        return "fork server, which" in words(other)

    # One that is stopped goes on at the next look, which may be too soon to be seen.
    is_seen = [is_held_up] if what == "trace_server" else [is_held_up, runs]
    until(lambda: any(seen(each) for each in others for seen in is_seen), "why they wait")
    go.touch()
    for other in others:
        assert running.finished(running.url + path, other)["status"] == "status_succeeded"
    running.delete(running.url + path, job)
    until(lambda: left(running, path, job) == [], "all of it gone")
