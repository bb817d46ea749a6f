"""How a supervisor ends a job's leftovers when the sweep is very late, or the job never began."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SETUP = """
import os, socket, subprocess, sys, time, types
from cortex.worker import processes
from cortex.worker.supervisor import signals, station, watch
from cortex.worker.messages import Order, Setup

folder = sys.argv[1]
project = folder + "/project"
os.mkdir(project)
processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
setup = Setup(package="", import_dir="", open_files=64, own_folder="copy", own_root=folder, project=project, python_path=None,
              path=None, command=["true"], env={}, preload=[])
order = Order(job_id="job", attempt=1, folder=folder, grace_s=1, timeout=None, deadline=None,
              log_limit=1 << 20, mem=None, memory_kind=None, memory_dir=None, gpus=[], job={},
              visible_gpus=None)
watch_station = station.Station(setup, signals.Signals(for_python=False), socket.socketpair()[0], 0)
job = watch.Supervisor(watch_station, order)
"""
STOPPED_MIDWAY = """
daemon = "import os, sys, time; os.setsid(); os.fork(); print(os.getpid(), flush=True); time.sleep(60)"
for _ in range(3):
    made = subprocess.Popen([sys.executable, "-c", daemon], stdout=subprocess.PIPE)
    made.stdout.readline(), made.stdout.readline()

# Right after the first process is stopped, this process is stopped as well, for a minute.
late = [0.0]
monotonic, send = time.monotonic, processes.send_signals


def stop(processes, *signals):
    send(processes, *signals)
    late[0] = 60.0


watch.processes.send_signals = stop
watch.time = types.SimpleNamespace(
    monotonic=lambda: monotonic() + late[0], time_ns=time.time_ns, sleep=time.sleep
)
job._kill()
print(job.is_childless, len(processes.descendants(os.getpid())))
"""


def test_stopped_processes_are_killed_however_late_the_sweep_is(tmp_path: Path) -> None:
    """The supervisor itself was stopped in the middle of the sweep, longer than a sweep takes."""
    assert output_of(STOPPED_MIDWAY, tmp_path) == "True 0\n"


UNBEGUN = """
killed = []
kill = os.kill
os.kill = lambda pid, number: killed.append(pid in processes.children(os.getpid())) or kill(pid, number)
watch_station.prefork()
job.order.memory_kind = "v1"  # and no group came with the order
job.cgroup = watch.cgroups.JobCgroup(job.order, None)
print(job.run(), killed, job.is_childless)
"""


def test_the_waiting_process_is_not_signalled_after_it_is_reaped(tmp_path: Path) -> None:
    """The job cannot begin, and the supervisor kills the process that was forked for it. The pid
    may then belong to any other process."""
    assert output_of(UNBEGUN, tmp_path) == "False [True] True\n"
    record = (tmp_path / "exit.1").read_text()
    assert '"ending": "lost"' in record
    assert "\n" not in record, "the record is in a shared file, which the next attempt cannot reach"


def output_of(script: str, folder: Path) -> str:
    command = [sys.executable, "-c", SETUP + script, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
