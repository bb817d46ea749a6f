"""Stop means gone, and timeout means over: also where a job turns on the processes that watch over it, and where
nobody collects what has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cortex.worker import processes
from support import PROBE, Operator, operator, probe_yaml, until

# As a container whose first process is a shell: it inherits whatever is left, and waits for none of it.
COLLECTS_NOTHING = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1)
child = subprocess.Popen(sys.argv[1:])
time.sleep(600)
"""


def supervisor_of(running: Operator, job: Any) -> int:
    records = running.data_dir / "jobs" / job["job_id"]
    until(lambda: list(records.glob("start.*")), "a start record")
    return int(json.loads(max(records.glob("start.*")).read_bytes())["pid"])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def state(pid: int) -> str:
    about = processes.stat(pid)
    return "gone" if about is None else about[0]


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
            assert "supervising process was killed" in status["message"]
            assert state(supervisor) == "Z"
            before = cpu_s(running.process.pid)
            time.sleep(2)  # in which it has nothing to do
            assert cpu_s(running.process.pid) - before < 0.4
        finally:
            collects_nothing.kill()
            collects_nothing.wait()
