"""A real operator in a process of its own, real projects, real HTTP: what the tests stand on."""

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
WAIT_TIMEOUT_S = 180  # where many tests share a few cores, an environment takes long to build
FINAL = {
    "status_succeeded",
    "status_worker_error",
    "status_worker_oom",
    "status_timed_out",
    "status_stopped",
    "status_unexpected_error",
}
TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z$")

# One task that does what its config says. A line is one write: standard output is not buffered.
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


def by_its_owner(lay_out: Callable[[Path], object], holds: Callable[[Path], bool]) -> bool:
    """What is found in a new folder by its owner, who is not root: root may do anything anywhere."""
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
                code = int(not holds(own))
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 0


def probe_yaml(name: str = "probe", more: str = "") -> str:
    """A cortex.yaml of one API that takes next to no CPU, so that tests do not wait for it."""
    return (
        f"- name: {name}\n"
        "  kind: TaskAPI\n"
        "  definition:\n"
        "    path: probe.py\n"
        '    config: {base: 1, nested: {kept: true, replaced: "no"}}\n'
        "  compute: {cpu: 1m}\n" + more
    )


class Operator:
    """`cortex serve` on a free port, and a data folder of its own if it is given no other."""

    def __init__(self, folder: Path, *options: str, data_dir: Path | None = None) -> None:
        self.folder = folder
        self.data_dir = data_dir or folder / "data"
        self.options = options
        self.within: list[str] = []  # a command that runs the operator's
        self.log = folder / "operator.log"
        # Longer than a long poll may take, and connections are let go of before the operator lets go of
        # them (uvicorn: 5 s idle): else a request can meet a closing one.
        self.http = httpx.Client(
            timeout=WAIT_TIMEOUT_S + 30,
            limits=httpx.Limits(keepalive_expiry=2.0),
            verify=False,  # nothing is encrypted, and to load all authorities takes 40 ms
        )
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        config = {"CORTEX_CLI_CONFIG_DIR": str(self.data_dir.parent / "cli")}
        environment = {**os.environ, **config, **self.environment}
        words = ["serve", "--port", "0", "--data-dir", str(self.data_dir), *self.options]
        own, told = os.pipe()
        with os.fdopen(own) as said, self.log.open("a") as log:
            output: dict[str, Any] = {"stdin": 0, "stdout": told, "stderr": log.fileno()}
            self.process: subprocess.Popen[bytes] | preloaded_cli.Program
            if self.within:
                command = [*self.within, CORTEX, *words]
                self.process = subprocess.Popen(command, env=environment, **output)
            else:
                self.process = preloaded_cli.start(*words, env=environment, **output)
            os.close(told)
            line = said.readline()
        assert " listening on " in line, self.log.read_text()
        self.url = line.split()[-1]

    def kill(self) -> None:
        """As a crash would: SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """As an administrator would: SIGTERM."""
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
        """Deploy one API; its endpoint."""
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
        """The job_status once it is final."""
        found = self.get(endpoint, job, wait=WAIT_TIMEOUT_S)["job_status"]
        assert found["status"] in FINAL, found
        return found

    def run(self, endpoint: str, **body: object) -> Any:
        """Submit, and the final job_status."""
        return self.finished(endpoint, self.submit(endpoint, **body))

    def log_of(self, endpoint: str, job: Any) -> str:
        return self.http.get(f"{endpoint}/{job['job_id']}/logs").text

    def await_log(self, endpoint: str, job: Any, text: str) -> None:
        until(lambda: text in self.log_of(endpoint, job), f"{text!r} in the log")

    def delete(self, endpoint: str, job: Any) -> httpx.Response:
        return self.http.delete(f"{endpoint}/{job['job_id']}")


def reachable() -> list[str]:
    """A command in whose mounts any user can reach this interpreter: it may lie in root's home."""
    closed = [p for p in Path(sys.base_prefix).parents if not p.stat().st_mode & 1]
    if not closed:
        return []
    script = (
        'mkdir "$3" && mount --bind "$2" "$3" && mount -t tmpfs -o mode=755 tmpfs "$1" '
        '&& mkdir -p "$2" && mount --move "$3" "$2" && rmdir "$3" && shift 3 && exec "$@"'
    )
    aside = tempfile.mktemp(prefix="cortex-test-")
    return ["unshare", "-m", "sh", "-c", script, "sh", str(closed[-1]), sys.base_prefix, aside]


def refused(data_dir: Path, *options: str) -> str:
    """What `cortex serve` says when it does not start."""
    done = preloaded_cli.run("serve", "--port", "0", "--data-dir", str(data_dir), *options)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


@contextmanager
def operator(
    folder: Path, *options: str, within: list[str] | None = None, token: str | None = None
) -> Iterator[Operator]:
    """An operator that runs; at the end its APIs are deleted and nothing of it may be left."""
    folder.mkdir(parents=True, exist_ok=True)
    running = Operator(folder, "--grace", "1", *options)
    running.within = within or []
    if token is not None:
        running.http.headers["Authorization"] = f"Bearer {token}"
    running.start()
    try:
        yield running
    finally:
        try:
            _end(running)
        finally:  # a check that failed leaves no operator behind
            running.kill()


@contextmanager
def operators(
    folder: Path, number: int, *options: str, token: str | None = None
) -> Iterator[list[Operator]]:
    """Several operators that share a store, which the options name, and a data folder."""
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
            _end(*made)
        finally:
            for each in made:
                each.kill()


def _end(*all_of_them: Operator) -> None:
    for running in all_of_them:
        if running.process.poll() is not None:
            running.start()
    running = all_of_them[0]
    for api in running.http.get(f"{running.url}/-/apis").json():
        running.http.delete(f"{running.url}/-/apis/{api['spec']['name']}")
    until(lambda: not _workers(running.data_dir), "the workers gone")
    codes = []
    for each in all_of_them:
        each.http.close()
        codes.append(each.stop())
    until(lambda: not processes_with(str(running.data_dir)), "all processes gone")
    root = running.data_dir / "jobs"
    names = {path.name for path in root.iterdir()} | {_limits().group_prefix(root)}
    until(lambda: not _swept(root, names), "the cgroups gone")
    for each, code in zip(all_of_them, codes, strict=True):
        told = each.log.read_text()
        assert code == 0, told
        assert "Traceback" not in told, told


def _workers(data_dir: Path) -> list[int]:
    # A fork server has the room for a job's id in its environment, and dashes in it.
    job = re.compile(rb"\bCORTEX_JOB_ID=[0-9a-z]")
    return [pid for pid in processes_with(str(data_dir)) if job.search(_environ(pid))]


def _limits() -> ModuleType:
    before = list(sys.path)
    from cortex.engines.local import (
        cgroup_support,
    )  # here: what it loads, a program itself, drops a path

    sys.path[:] = before
    return cgroup_support


def _swept(root: Path, names: set[str]) -> list[str]:
    """The control groups that are left, without those that a killed operator has left empty: the next one would
    remove them. The kernel may call one busy for a while after its last process was reaped."""
    if left := _limits().list_groups(root):
        for group in left:
            _limits().cgroups.remove(group, timeout_s=0)
        _limits().remove_parents(root)
    return _cgroups(names)


def _cgroups(names: set[str]) -> list[str]:
    return [
        folder
        for folder, _, _ in os.walk("/sys/fs/cgroup")
        if any(name in folder for name in names)
    ]


def processes_with(mark: str) -> list[int]:
    """The processes that have a text in their environment or command line."""
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
    """Wait for a condition; the test fails when it never comes."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)  # to look through all processes is work, too
