"""Installs and starts docs/deploy/cortex.service. Runs only in the machine of `tests/vm/vm.py`,
because it changes the system."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from operator_harness import PROBE, Operator, probe_yaml, until

REPOSITORY = Path(__file__).resolve().parents[2]
UNIT = REPOSITORY / "docs" / "deploy" / "cortex.service"
DATA = Path("/var/lib/cortex")
PORT = 8888
README = UNIT.with_name("README.md")
UNCHANGED = ""
DELEGATED = "Delegate=yes\n"
DROP_INS = re.findall(r"^\[Service\]\n(.*?)^```", README.read_text(), re.M | re.S)
(SLICE,) = [text for text in DROP_INS if "Slice=" in text]
(RUN_AS_ROOT,) = [
    text.replace("RUN_AS=cortex", "RUN_AS=nobody") for text in DROP_INS if "RUN_AS" in text
]
VARIANTS = {
    "as it is": UNCHANGED,
    "delegated": DELEGATED,
    "in a slice": SLICE,
    "run-as": RUN_AS_ROOT,
    "run-as delegated": RUN_AS_ROOT + DELEGATED,
}
LIMITED = probe_yaml("limited").replace("cpu: 1m", "cpu: 1m, mem: 64Mi")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr, journal())
    return done.stdout.strip()


def journal() -> str:
    command = ["journalctl", "--no-pager", "-u", "cortex", "-n", "40"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


class Unit(Operator):
    """The operator as a unit of systemd."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, data_dir=DATA)
        self.name = name
        self.url = f"http://localhost:{PORT}"

    @property
    def pid(self) -> int:
        return int(run("systemctl", "show", "-P", "MainPID", "cortex"))

    def systemctl(self, verb: str) -> None:
        run("systemctl", verb, "cortex")
        if verb != "stop":
            try:
                until(self.answers, "the operator answers")
            except AssertionError as error:
                raise AssertionError(journal()) from error

    def answers(self) -> bool:
        assert run("systemctl", "show", "-P", "ActiveState", "cortex") != "failed", journal()
        try:
            return self.http.get(f"{self.url}/readyz").status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture(scope="module")
def user() -> None:
    run("useradd", "--system", "--create-home", "cortex")
    Path("/etc/cortex").mkdir()
    Path("/etc/cortex/operator.yaml").write_text(f"port: {PORT}\ngrace: 2\n")
    Path("/opt/cortex").symlink_to(REPOSITORY / ".venv")
    shutil.copyfile(UNIT, "/etc/systemd/system/cortex.service")


@pytest.fixture(scope="module", params=VARIANTS)
def unit(
    request: pytest.FixtureRequest, user: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Unit]:
    extra = Path("/etc/systemd/system/cortex.service.d/variant.conf")
    extra.parent.mkdir(exist_ok=True)
    extra.write_text(f"[Service]\n{VARIANTS[request.param]}")
    shutil.rmtree(DATA, ignore_errors=True)
    run("systemctl", "daemon-reload")
    installed = Unit(tmp_path_factory.mktemp("unit"), request.param)
    installed.systemctl("start")
    yield installed
    for api in installed.http.get(f"{installed.url}/-/apis").json():
        installed.http.delete(f"{installed.url}/-/apis/{api['spec']['name']}")
    installed.http.close()
    installed.systemctl("stop")
    subprocess.run(["systemctl", "reset-failed"], check=True)
    until(lambda: not leftovers(), f"no process is left: {leftovers()}")


def leftovers() -> list[str]:
    """The processes that name the data folder: none once all jobs and the operator have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if bytes(DATA) in words and int(folder.name) != os.getpid():
            found.append(folder.name)
    return found


def pid_of(unit: Unit, endpoint: str, job: Any) -> int:
    until(lambda: "pid " in unit.log_of(endpoint, job), "the job logs its pid")
    return int(unit.log_of(endpoint, job).split("pid ")[1].split()[0])


def sleeper(unit: Unit, name: str) -> tuple[str, Any, int]:
    code = (
        "import os, time\n"
        "def task(config):\n"
        "    print('pid', os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    endpoint = unit.deployed(probe_yaml(name), {"probe.py": code})
    job = unit.submit(endpoint)
    return endpoint, job, pid_of(unit, endpoint, job)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_job_runs_as_the_user_of_the_unit(unit: Unit) -> None:
    code = "import os, pwd\ndef task(config): return pwd.getpwuid(os.getuid()).pw_name\n"
    endpoint = unit.deployed(probe_yaml("who"), {"probe.py": code})
    done = unit.run(endpoint)
    user = "nobody" if "run-as" in unit.name else "cortex"
    assert done.get("result") == user, f"{done}\n{unit.log_of(endpoint, done)}\n{journal()}"


def test_a_job_beyond_its_memory_limit_ends(unit: Unit) -> None:
    endpoint = unit.deployed(LIMITED, {"probe.py": PROBE})
    done = unit.run(endpoint, config={"do": "allocate"})
    assert done["status"] == "status_worker_oom", (done, unit.http.get(f"{unit.url}/-/info").text)
    limited = unit.http.get(f"{unit.url}/-/info").json()["memory_limit"]
    assert limited == ("watchdog" if unit.name in {"as it is", "delegated"} else "cgroup v2")
    assert unit.answers()


def test_a_restart_of_the_unit_ends_no_job(unit: Unit) -> None:
    endpoint, job, pid = sleeper(unit, "sleeper")
    before = unit.pid
    unit.systemctl("restart")
    assert unit.pid != before
    assert is_alive(pid)
    assert unit.status(endpoint, job)["status"] == "status_running"
    # systemd starts a killed operator again.
    os.kill(unit.pid, 9)
    before = unit.pid
    until(lambda: unit.pid not in (0, before), "systemd starts the operator again")
    until(unit.answers, "the operator answers again")
    assert is_alive(pid)
    assert unit.status(endpoint, job)["status"] == "status_running"
    assert unit.run(unit.deployed(LIMITED, {"probe.py": PROBE}))["status"] == "status_succeeded"
    assert unit.delete(endpoint, job).status_code == 200
    until(lambda: not is_alive(pid), "the job's process has ended")


def test_a_stop_of_the_unit_ends_no_job_and_a_start_recovers_it(unit: Unit) -> None:
    endpoint, job, pid = sleeper(unit, "sleeper")
    unit.systemctl("stop")
    assert is_alive(pid)
    unit.systemctl("start")
    assert unit.status(endpoint, job)["status"] == "status_running"
    assert unit.delete(endpoint, job).status_code == 200
    until(lambda: not is_alive(pid), "the job's process has ended")
    assert unit.finished(endpoint, job)["status"] == "status_stopped"


def test_a_stop_ends_every_hidden_process_of_a_job(unit: Unit) -> None:
    code = (
        "import os, time\n"
        "def task(config):\n"
        "    for _ in range(3):\n"
        "        if os.fork() == 0:\n"
        "            os.setsid()\n"
        "            if os.fork() == 0:\n"
        "                os.execve('/bin/sleep', ['cortex-hidden', '600'], {})\n"
        "            os._exit(0)\n"
        "    print('pid', os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
    )

    def hidden() -> list[str]:
        return subprocess.run(
            ["pgrep", "-f", "^cortex-hidden"], capture_output=True, text=True, check=False
        ).stdout.split()

    endpoint = unit.deployed(probe_yaml("hiding"), {"probe.py": code})
    job = unit.submit(endpoint)
    pid_of(unit, endpoint, job)
    until(lambda: len(hidden()) == 3, "all three processes are hidden")
    assert unit.delete(endpoint, job).status_code == 200
    until(lambda: not hidden(), "all hidden processes have ended")
