"""Runs real operators in processes of their own, and sends them projects and requests over HTTP."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx

import preloaded_cli
from cortex.projects.pack import pack

CORTEX = str(Path(sys.executable).with_name("cortex"))
WAIT_TIMEOUT_S = 180  # building an environment is slow while many tests share few cores
FINAL = {
    "status_succeeded",
    "status_worker_error",
    "status_worker_oom",
    "status_timed_out",
    "status_stopped",
    "status_unexpected_error",
}
TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z$")

# A task that does what its config says. It writes each line with one write, without a buffer.
PROBE = """
import ctypes, json, os, signal, subprocess, sys, time


class Task:
    def __call__(self, config):
        return getattr(self, config.get("do", "echo"))(config)

    def echo(self, config):
        return config

    def say(self, config):
        for number in range(config.get("lines", 1)):
            print(f"line {number}\\n", end="", flush=True)
            time.sleep(config.get("pause", 0))
            while not os.path.exists(config.get("go", "/")):
                time.sleep(0.02)

    def surroundings(self, config):
        return {"cwd": os.getcwd(), "files": sorted(os.listdir()), "env": dict(os.environ),
                "spec": json.load(open(os.environ["CORTEX_JOB_SPEC"]))}

    def fail(self, config):
        raise ValueError(config["message"])

    def leave(self, config):
        sys.exit(config["code"])

    def die(self, config):
        os.kill(os.getpid(), config["signal"])
        time.sleep(60)

    def sleep(self, config):
        print("asleep\\n", end="", flush=True)
        time.sleep(config["s"])
        return "rested"

    def allocate(self, config):
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1)) * (4 * 1024 * 1024))

    def stubborn(self, config):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("asleep\\n", end="", flush=True)
        while True:
            time.sleep(1)

    def breed(self, config):
        # Daemonised grandchildren, each of which ignores SIGTERM and keeps forking for a while.
        code = ("import os, signal, time\\n"
                "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
                "os.setsid()\\n"
                "for _ in range(200):\\n"
                "    if os.fork() == 0:\\n"
                "        os.setsid()\\n"
                "        time.sleep(300)\\n"
                "        os._exit(0)\\n"
                "    time.sleep(0.01)\\n"
                "time.sleep(300)\\n")
        for _ in range(3):
            subprocess.Popen([sys.executable, "-c", code], env={"MARK": config["mark"]})
        print("asleep\\n", end="", flush=True)
        time.sleep(config["s"])

    def save_on_term(self, config):
        def save(*_):
            with open(os.path.join(os.environ["CORTEX_JOB_DIR"], "saved"), "w") as file:
                file.write("checkpoint")
            print("saved\\n", end="", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        print("asleep\\n", end="", flush=True)
        time.sleep(300)

    def unserialisable(self, config):
        return object()
"""


def as_unprivileged_owner(lay_out: Callable[[Path], object], check: Callable[[Path], bool]) -> bool:
    """Whether a check holds in a new folder for its owner, a user without root's rights.

    Args:
        lay_out: fills the folder.
        check: runs in a child process as the owner; root would pass every permission check.
    """
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        lay_out(own)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if os.getuid() == 0:
                    for path in (*own.rglob("*"), own):
                        os.chown(path, 65534, 65534)
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                code = int(not check(own))
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 0


def probe_yaml(name: str = "probe", more: str = "") -> str:
    """A cortex.yaml of one API that requests almost no CPU: its jobs start at once."""
    return (
        f"- name: {name}\n"
        "  kind: TaskAPI\n"
        "  definition:\n"
        "    path: probe.py\n"
        '    config: {base: 1, nested: {kept: true, replaced: "no"}}\n'
        "  compute: {cpu: 1m}\n" + more
    )


class Operator:
    """`cortex serve` on a free port, with its own data folder unless `data_dir` names another."""

    def __init__(self, folder: Path, *options: str, data_dir: Path | None = None) -> None:
        self.folder = folder
        self.data_dir = data_dir or folder / "data"
        self.options = options
        self.command_prefix: list[str] = []  # a command that executes `cortex serve`
        self.popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
        self.log = folder / "operator.log"
        # The timeout exceeds the longest long poll. The client closes idle connections before the
        # operator does (uvicorn: after 5 s): otherwise a request can meet a closing connection.
        self.http = httpx.Client(
            timeout=WAIT_TIMEOUT_S + 30,
            limits=httpx.Limits(keepalive_expiry=2.0),
            verify=False,  # nothing is encrypted, and loading the certificates takes 40 ms
        )
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        config = {"CORTEX_CLI_CONFIG_DIR": str(self.data_dir.parent / "cli")}
        environment = {**os.environ, **config, **self.environment}
        words = ["serve", "--port", "0", "--data-dir", str(self.data_dir), *self.options]
        read_end, write_end = os.pipe()
        with os.fdopen(read_end) as printed, self.log.open("a") as log:
            output: dict[str, Any] = {"stdin": 0, "stdout": write_end, "stderr": log.fileno()}
            self.process: subprocess.Popen[bytes] | preloaded_cli.Program
            if self.command_prefix or self.popen is not subprocess.Popen:
                command = [*self.command_prefix, CORTEX, *words]
                self.process = self.popen(command, env=environment, **output)
            else:
                self.process = preloaded_cli.start(*words, env=environment, **output)
            os.close(write_end)
            line = printed.readline()
        assert " listening on " in line, self.log.read_text()
        self.url = line.split()[-1]

    def kill(self) -> None:
        """Send SIGKILL, as in a crash."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Send SIGTERM, as an administrator does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_TIMEOUT_S)

    def deploy(self, yaml: str, files: dict[str, str], **form: str) -> httpx.Response:
        folder = self.folder / "project"
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        for name, content in {"cortex.yaml": yaml, **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        archive = io.BytesIO()
        pack(folder, archive)
        return self.upload(yaml, archive.getvalue(), **form)

    def upload(self, yaml: str, archive: bytes, **form: str) -> httpx.Response:
        return self.http.post(
            f"{self.url}/-/apis",
            files={"config": ("cortex.yaml", yaml.encode()), "project": ("p.tar.gz", archive)},
            data=form,
        )

    def deployed(self, yaml: str, files: dict[str, str]) -> str:
        """Deploy one API, which must succeed; its endpoint."""
        response = self.deploy(yaml, files)
        assert response.status_code == 200, response.text
        return str(response.json()[0]["api"]["endpoint"])

    def submit(self, endpoint: str, **body: object) -> Any:
        response = self.http.post(endpoint, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, endpoint: str, job: Any, **query: object) -> Any:
        response = self.http.get(f"{endpoint}/{job['job_id']}", params=query)  # type: ignore[arg-type]
        assert response.status_code == 200, response.text
        return response.json()

    def status(self, endpoint: str, job: Any) -> Any:
        return self.get(endpoint, job)["job_status"]

    def finished(self, endpoint: str, job: Any) -> Any:
        """Wait for the end of a job; its final job_status."""
        found = self.get(endpoint, job, wait=WAIT_TIMEOUT_S)["job_status"]
        assert found["status"] in FINAL, found
        return found

    def run(self, endpoint: str, **body: object) -> Any:
        """Submit a job and wait for its end; its final job_status."""
        return self.finished(endpoint, self.submit(endpoint, **body))

    def log_of(self, endpoint: str, job: Any) -> str:
        return self.http.get(f"{endpoint}/{job['job_id']}/logs").text

    def await_log(self, endpoint: str, job: Any, text: str) -> None:
        until(lambda: text in self.log_of(endpoint, job), f"{text!r} in the log")

    def delete(self, endpoint: str, job: Any) -> httpx.Response:
        return self.http.delete(f"{endpoint}/{job['job_id']}")


def reachable_interpreter() -> list[str]:
    """A command prefix in whose mounts every user can reach this Python interpreter.

    The interpreter may lie in root's home, which other users cannot enter.
    """
    closed = [p for p in Path(sys.base_prefix).parents if not p.stat().st_mode & 1]
    if not closed:
        return []
    script = (
        'mkdir "$3" && mount --bind "$2" "$3" && mount -t tmpfs -o mode=755 tmpfs "$1" '
        '&& mkdir -p "$2" && mount --move "$3" "$2" && rmdir "$3" && shift 3 && exec "$@"'
    )
    aside = tempfile.mktemp(prefix="cortex-test-")
    return ["unshare", "-m", "sh", "-c", script, "sh", str(closed[-1]), sys.base_prefix, aside]


def startup_error(data_dir: Path, *options: str) -> str:
    """The message of a `cortex serve` that must not start."""
    done = preloaded_cli.run("serve", "--port", "0", "--data-dir", str(data_dir), *options)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


@contextmanager
def operator(
    folder: Path, *options: str, command_prefix: list[str] | None = None, token: str | None = None
) -> Iterator[Operator]:
    """A running operator. At the end it must leave no process and no control group."""
    folder.mkdir(parents=True, exist_ok=True)
    running = Operator(folder, "--grace", "1", *options)
    running.command_prefix = command_prefix or []
    if token is not None:
        running.http.headers["Authorization"] = f"Bearer {token}"
    running.start()
    try:
        yield running
    finally:
        try:
            _stop_and_check(running)
        finally:  # end the operator even if a check fails
            running.kill()


@contextmanager
def operators(
    folder: Path, number: int, *options: str, token: str | None = None
) -> Iterator[list[Operator]]:
    """Several running operators with one data folder and one store, which the options name."""
    data_dir = folder / "data"
    made = [
        Operator(folder / str(n), "--grace", "1", *options, data_dir=data_dir)
        for n in range(number)
    ]
    for each in made:
        each.folder.mkdir(parents=True)
        if token is not None:
            each.http.headers["Authorization"] = f"Bearer {token}"
    with ThreadPoolExecutor(number) as pool:
        list(pool.map(Operator.start, made))
    try:
        yield made
    finally:
        try:
            _stop_and_check(*made)
        finally:
            for each in made:
                each.kill()


def _stop_and_check(*running_operators: Operator) -> None:
    """Delete all APIs, stop the operators, and check their exit codes, logs and leftovers."""
    for running in running_operators:
        if running.process.poll() is not None:
            running.start()
    running = running_operators[0]
    for api in running.http.get(f"{running.url}/-/apis").json():
        running.http.delete(f"{running.url}/-/apis/{api['spec']['name']}")
    until(lambda: not _job_processes(running.data_dir), "all job processes have exited")
    codes = []
    for each in running_operators:
        each.http.close()
        codes.append(each.stop())
    until(lambda: not processes_with(str(running.data_dir)), "all processes have exited")
    root = running.data_dir / "jobs"
    names = {path.name for path in root.iterdir()} | {_cgroup_support().group_prefix(root)}
    until(lambda: not _remaining_groups(root, names), "all control groups are removed")
    for each, code in zip(running_operators, codes, strict=True):
        log = each.log.read_text()
        assert code == 0, log
        assert "Traceback" not in log, log


def _job_processes(data_dir: Path) -> list[int]:
    # A fork server reserves this variable for a job's id, filled with dashes.
    job = re.compile(rb"\bCORTEX_JOB_ID=[0-9a-z]")
    return [pid for pid in processes_with(str(data_dir)) if job.search(_environ(pid))]


def _cgroup_support() -> ModuleType:
    # Imported here: it loads a module that is also a program and removes an entry of `sys.path`.
    before = list(sys.path)
    from cortex.engines.local import cgroup_support

    sys.path[:] = before
    return cgroup_support


def _remaining_groups(root: Path, names: set[str]) -> list[str]:
    """Remove empty control groups; the groups that remain.

    A killed operator leaves its empty groups, which the next operator would remove. The kernel may
    report a group as busy for a short time after its last process was reaped.
    """
    if groups := _cgroup_support().list_groups(root):
        for group in groups:
            _cgroup_support().cgroups.remove(group, timeout_s=0)
        _cgroup_support().remove_parents(root)
    return _groups_named(names)


def _groups_named(names: set[str]) -> list[str]:
    return [
        folder
        for folder, _, _ in os.walk("/sys/fs/cgroup")
        if any(name in folder for name in names)
    ]


def processes_with(mark: str) -> list[int]:
    """The processes with this text in their environment or command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            pid = int(entry)
            if mark.encode() in _environ(pid) + _read(f"/proc/{pid}/cmdline"):
                found.append(pid)
    return found


def _environ(pid: int) -> bytes:
    return _read(f"/proc/{pid}/environ")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def until(condition: Callable[..., object], what: str) -> None:
    """Wait until a condition holds; fail the test after `WAIT_TIMEOUT_S`."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)  # some conditions read all of /proc
