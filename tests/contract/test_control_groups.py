"""Hostile jobs of an operator with `--run-as` against control groups and rights.

A job cannot leave its control group, lift its memory limit, gain rights by a program that it
executes, or leave processes behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex.engines.local import cgroup_support
from operator_harness import PROBE, Operator, probe_yaml, until
from root_operator import UID, operator_as_root

LIMITED = probe_yaml("limited").replace("cpu: 1m", "cpu: 1m, mem: 64Mi")


@pytest.fixture(scope="module")
def run_as_operator() -> Iterator[Operator]:
    with operator_as_root() as running_processes:
        yield running_processes


LIFTER = """
import json, os, sys

FILES = ("tasks", "cgroup.procs", "memory.max", "memory.high", "memory.swap.max", "memory.oom.group",
         "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.oom_control",
         "memory.force_empty", "memory.move_charge_at_immigrate", "cgroup.event_control", "cgroup.subtree_control",
         "cgroup.kill", "cgroup.freeze", "freezer.state", "notify_on_release")


def attempt(what, action):
    try:
        action()
    except OSError:
        return []
    return [what]


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def folders(config):
    # All groups below /sys/fs/cgroup, the job's own ones, and the other job's by its name.
    # Groups of other operators are left out: their version may allow what this one refuses.
    for folder, _, _ in os.walk("/sys/fs/cgroup"):
        if "/cortex-" not in folder or config["prefix"] in folder:
            yield folder
    mounts = [line.split() for line in open("/proc/self/mountinfo") if " - cgroup" in line]
    for line in open("/proc/self/cgroup"):
        _, controllers, path = line.strip().split(":", 2)
        for mount in mounts:
            own = mount[4] + path
            yield own
            yield os.path.dirname(own)
            yield own.replace(os.environ["CORTEX_JOB_ID"], config["other"])
    # The descriptors of groups that its supervisor has open.
    for fd in os.listdir(f"/proc/{os.getppid()}/fd"):
        if "cgroup" in os.readlink(f"/proc/{os.getppid()}/fd/{fd}"):
            yield f"/proc/{os.getppid()}/fd/{fd}"


def task(config):
    done = []
    for folder in folders(config):
        for name in FILES:
            for text in ("0", str(os.getpid()), str(1 << 40), "max", "1"):
                done += attempt(f"{folder}/{name}", lambda: write(f"{folder}/{name}", text))
        done += attempt(f"{folder}/below", lambda: os.mkdir(f"{folder}/below"))
        if "/fd/" in folder:
            done += attempt(folder, lambda: write(folder, str(1 << 40)))
    print(json.dumps({"done": done, "groups": open("/proc/self/cgroup").read()}), flush=True)
    hoard = []
    while sum(map(len, hoard)) < 512 << 20:
        hoard.append(bytearray(os.urandom(1)) * (4 << 20))
    return "more than its limit"
"""


def prefix(run_as_operator: Operator) -> str:
    return cgroup_support.group_prefix(run_as_operator.data_dir / "jobs")


def limit_of(run_as_operator: Operator) -> str:
    return str(run_as_operator.http.get(f"{run_as_operator.url}/-/info").json()["memory_limit"])


def test_a_job_lifts_no_limit_and_leaves_no_group(run_as_operator: Operator) -> None:
    sleeper = run_as_operator.deployed(
        probe_yaml().replace("cpu: 1m", "cpu: 1m, mem: 1Gi"), {"probe.py": PROBE}
    )
    victim = run_as_operator.submit(sleeper, config={"do": "sleep", "s": 300})
    run_as_operator.await_log(sleeper, victim, "asleep")
    endpoint = run_as_operator.deployed(LIMITED, {"probe.py": LIFTER})
    job = run_as_operator.submit(
        endpoint, config={"other": victim["job_id"], "prefix": prefix(run_as_operator)}
    )
    end = run_as_operator.finished(endpoint, job)
    report = json.loads(run_as_operator.log_of(endpoint, job).splitlines()[0])
    assert report["done"] == []
    if "cgroup" in limit_of(run_as_operator):
        assert f"{job['job_id']}-1" in report["groups"]
    assert end["status"] == "status_worker_oom"
    assert "64 MiB" in end["message"]
    run_as_operator.delete(sleeper, victim)
    assert run_as_operator.finished(sleeper, victim)["status"] == "status_stopped"


HIDDEN = """
import ctypes, os, signal, sys, time

HIDE = '''
import ctypes, os, signal, sys, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
print("hidden", os.getpid(), flush=True)
for fd in range(3): os.close(fd)
os.chdir("/")
for number in signal.valid_signals():
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
time.sleep(300)
'''


def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])


def task(config):
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    supervisor = os.getppid()
    server = parent(supervisor)
    if os.fork() == 0:
        os.execve(sys.executable, [sys.executable, "-c", HIDE], {})
    os.wait()
    time.sleep(0.2)
    while os.path.exists(config["while"]):
        time.sleep(0.02)
    if config["forge"]:
        folder = os.path.dirname(os.environ["CORTEX_JOB_SPEC"])
        record = '{"ending": "exited", "exit_code": 0, "start_ns": 1, "end_ns": 1, "message": null}'
        with open(folder + "/exit.1", "w") as file:
            file.write(record)
    for pid in (server, supervisor):
        os.kill(pid, signal.SIGKILL)
    time.sleep(300)
"""


def hidden_pid(run_as_operator: Operator, endpoint: str, job: Any) -> int:
    line = re.compile(r"hidden (\d+)\n")
    until(
        lambda: line.search(run_as_operator.log_of(endpoint, job)), "the hidden process has started"
    )
    return int(line.findall(run_as_operator.log_of(endpoint, job))[0])


def is_alive(pid: int) -> bool:
    try:
        return b"hidden" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def skip_without_groups(run_as_operator: Operator) -> None:
    if "cgroup" not in limit_of(run_as_operator):
        pytest.skip("this machine has no control groups that may be used")


@pytest.mark.parametrize("forge", [False, True], ids=["", "with-an-exit-record"])
@pytest.mark.parametrize("yaml", [probe_yaml("hider"), LIMITED], ids=["", "mem"])
def test_a_hidden_process_that_killed_its_supervisor_is_ended(
    run_as_operator: Operator, yaml: str, forge: bool
) -> None:
    skip_without_groups(run_as_operator)
    endpoint = run_as_operator.deployed(yaml, {"probe.py": HIDDEN})
    job = run_as_operator.submit(endpoint, config={"while": "/nowhere", "forge": forge})
    end = run_as_operator.finished(endpoint, job)
    assert end["status"] == "status_succeeded" if forge else "status_unexpected_error"
    hidden = hidden_pid(run_as_operator, endpoint, job)
    until(lambda: not is_alive(hidden), "the hidden process has exited")


def test_the_next_operator_ends_a_process_that_hid_while_none_ran(
    run_as_operator: Operator,
) -> None:
    skip_without_groups(run_as_operator)
    endpoint = run_as_operator.deployed(probe_yaml("hider"), {"probe.py": HIDDEN})
    operator_folder = f"/proc/{run_as_operator.process.pid}"
    job = run_as_operator.submit(endpoint, config={"while": operator_folder, "forge": False})
    hidden = hidden_pid(run_as_operator, endpoint, job)
    supervisors = parents(hidden_supervisor(run_as_operator, job))
    run_as_operator.kill()
    until(lambda: not supervisors & running_processes(), "fork server and supervisor are killed")
    assert is_alive(hidden)
    run_as_operator.start()
    endpoint = f"{run_as_operator.url}/hider"
    assert run_as_operator.finished(endpoint, job)["status"] == "status_unexpected_error"
    until(lambda: not is_alive(hidden), "the hidden process has exited")


def hidden_supervisor(run_as_operator: Operator, job: Any) -> int:
    record = run_as_operator.data_dir / "jobs" / job["job_id"] / "start.1"
    return int(json.loads(record.read_bytes())["pid"])


def parents(supervisor: int) -> set[int]:
    stat = Path(f"/proc/{supervisor}/stat").read_text()
    return {supervisor, int(stat.rpartition(")")[2].split()[1])}


def running_processes() -> set[int]:
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            if stat.rpartition(")")[2].split()[0] not in "ZX":
                found.add(int(entry))
    return found


SETUID = """
import os, subprocess
def task(config):
    uid = subprocess.run([config["program"], "-u"], capture_output=True, text=True).stdout
    flags = [line.split()[1] for line in open("/proc/self/status") if line.startswith("NoNewPrivs")]
    server = open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[1]
    flags += [line.split()[1] for line in open(f"/proc/{server}/status") if line.startswith("NoNewPrivs")]
    return [uid.strip(), *flags]
"""


def test_a_setuid_program_gives_a_job_no_rights(run_as_operator: Operator) -> None:
    program = run_as_operator.folder / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    without = subprocess.run([program, "-u"], user=UID, capture_output=True, text=True, check=True)
    assert without.stdout.strip() == "0", "setuid programs work on this file system"
    endpoint = run_as_operator.deployed(probe_yaml("climber"), {"probe.py": SETUID})
    assert run_as_operator.run(endpoint, config={"program": str(program)})["result"] == [
        str(UID),
        "1",
        "1",
    ]


def test_a_setuid_program_gives_a_job_no_rights_without_run_as(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(probe_yaml("climber"), {"probe.py": SETUID})
    assert shared_operator.run(endpoint, config={"program": "/usr/bin/id"})["result"][1:] == [
        "1",
        "1",
    ]
