"""A job stays in its control group, keeps the memory limit that it has, gains no rights by what it executes, and
leaves nothing behind whatever it kills: hostile jobs of an operator with `--run-as`.
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
def other() -> Iterator[Operator]:
    with operator_as_root() as running:
        yield running


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
    # All that it finds, its own by what the kernel tells of them, and the other job's by its name.
    for folder, _, _ in os.walk("/sys/fs/cgroup"):
        if "/cortex-" not in folder or config["prefix"] in folder:  # another test's operator may be of any version
            yield folder
    mounts = [line.split() for line in open("/proc/self/mountinfo") if " - cgroup" in line]
    for line in open("/proc/self/cgroup"):
        _, controllers, path = line.strip().split(":", 2)
        for mount in mounts:
            own = mount[4] + path
            yield own
            yield os.path.dirname(own)
            yield own.replace(os.environ["CORTEX_JOB_ID"], config["other"])
    # And whatever its supervisor has open.
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


def prefix(other: Operator) -> str:
    return cgroup_support.group_prefix(other.data_dir / "jobs")


def limit_of(other: Operator) -> str:
    return str(other.http.get(f"{other.url}/-/info").json()["memory_limit"])


def test_a_job_lifts_no_limit_and_leaves_no_group(other: Operator) -> None:
    sleeper = other.deployed(
        probe_yaml().replace("cpu: 1m", "cpu: 1m, mem: 1Gi"), {"probe.py": PROBE}
    )
    victim = other.submit(sleeper, config={"do": "sleep", "s": 300})
    other.await_log(sleeper, victim, "asleep")
    endpoint = other.deployed(LIMITED, {"probe.py": LIFTER})
    job = other.submit(endpoint, config={"other": victim["job_id"], "prefix": prefix(other)})
    end = other.finished(endpoint, job)
    told = json.loads(other.log_of(endpoint, job).splitlines()[0])
    assert told["done"] == []
    if "cgroup" in limit_of(other):
        assert f"{job['job_id']}-1" in told["groups"]
    assert end["status"] == "status_worker_oom"
    assert "64 MiB" in end["message"]
    other.delete(sleeper, victim)
    assert other.finished(sleeper, victim)["status"] == "status_stopped"


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


def hidden_in(other: Operator, endpoint: str, job: Any) -> int:
    line = re.compile(r"hidden (\d+)\n")
    until(lambda: line.search(other.log_of(endpoint, job)), "the hidden process")
    return int(line.findall(other.log_of(endpoint, job))[0])


def is_there(pid: int) -> bool:
    try:
        return b"hidden" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def needs_groups(other: Operator) -> None:
    if "cgroup" not in limit_of(other):
        pytest.skip("this machine has no control groups that may be used")


@pytest.mark.parametrize("forge", [False, True], ids=["", "with-an-end-record"])
@pytest.mark.parametrize("yaml", [probe_yaml("hider"), LIMITED], ids=["", "mem"])
def test_what_hides_and_kills_all_that_watches_it_is_ended(
    other: Operator, yaml: str, forge: bool
) -> None:
    needs_groups(other)
    endpoint = other.deployed(yaml, {"probe.py": HIDDEN})
    job = other.submit(endpoint, config={"while": "/nowhere", "forge": forge})
    end = other.finished(endpoint, job)
    assert end["status"] == "status_succeeded" if forge else "status_unexpected_error"
    hidden = hidden_in(other, endpoint, job)
    until(lambda: not is_there(hidden), "the hidden process gone")


def test_what_hid_while_no_operator_ran_is_ended_by_the_next(other: Operator) -> None:
    needs_groups(other)
    endpoint = other.deployed(probe_yaml("hider"), {"probe.py": HIDDEN})
    operator_is_there = f"/proc/{other.process.pid}"
    job = other.submit(endpoint, config={"while": operator_is_there, "forge": False})
    hidden = hidden_in(other, endpoint, job)
    supervisors = parents(hidden_supervisor(other, job))
    other.kill()
    until(lambda: not supervisors & running(), "fork server and supervisor killed")
    assert is_there(hidden)
    other.start()
    endpoint = f"{other.url}/hider"
    assert other.finished(endpoint, job)["status"] == "status_unexpected_error"
    until(lambda: not is_there(hidden), "the hidden process gone")


def hidden_supervisor(other: Operator, job: Any) -> int:
    record = other.data_dir / "jobs" / job["job_id"] / "start.1"
    return int(json.loads(record.read_bytes())["pid"])


def parents(supervisor: int) -> set[int]:
    stat = Path(f"/proc/{supervisor}/stat").read_text()
    return {supervisor, int(stat.rpartition(")")[2].split()[1])}


def running() -> set[int]:
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
    said = subprocess.run([config["program"], "-u"], capture_output=True, text=True).stdout
    flags = [line.split()[1] for line in open("/proc/self/status") if line.startswith("NoNewPrivs")]
    server = open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[1]
    flags += [line.split()[1] for line in open(f"/proc/{server}/status") if line.startswith("NoNewPrivs")]
    return [said.strip(), *flags]
"""


def test_a_setuid_program_gives_a_job_no_rights(other: Operator) -> None:
    program = other.folder / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    without = subprocess.run([program, "-u"], user=UID, capture_output=True, text=True, check=True)
    assert without.stdout.strip() == "0", "setuid programs count on this file system"
    endpoint = other.deployed(probe_yaml("climber"), {"probe.py": SETUID})
    assert other.run(endpoint, config={"program": str(program)})["result"] == [str(UID), "1", "1"]


def test_nor_does_it_without_another_user(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(probe_yaml("climber"), {"probe.py": SETUID})
    assert shared_operator.run(endpoint, config={"program": "/usr/bin/id"})["result"][1:] == [
        "1",
        "1",
    ]
