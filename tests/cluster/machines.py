"""A Ray cluster whose machines are network namespaces, with operators on machines of their own,
PostgreSQL and S3, and the faults of machines and networks. Ray has its default health settings."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.namespaces import Machine, Network, network
from engines.ray_cluster import MIB, RAY, SMALL
from operator_harness import Operator, until
from postgresql_server import PostgreSQLServer, server
from s3_server import S3Server

# What the command lines of processes contain.
GCS = "gcs_server"
RAYLET = "raylet/raylet"
AGENT = "ray::Agent"
DRIVER = "cortex.ray_node.driver"

HEAD = "head"
DATABASE = "db"
FILES = "s3"
PORT = 6379
START_TIMEOUT_S = 180
LOG_LINES = 60  # of an operator's log, shown when a test fails

# Appends its job, attempt and machine to a file that all machines share, and ends when a file is
# there. A second run of an attempt leaves a second mark.
TASK = """
import os, time

def task(config):
    machine = os.uname().nodename
    mark = f"{os.environ['CORTEX_JOB_ID']} {os.environ['CORTEX_ATTEMPT']} {machine}\\n"
    fd = os.open(config["marks"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, mark.encode())
    os.close(fd)
    print("runs on", machine, flush=True)
    while not os.path.exists(config.get("go", "/")):
        time.sleep(0.1)
    return machine
"""

_ALIVE = """
import sys
from ray._raylet import GcsClient
for node in GcsClient(address=sys.argv[1]).get_all_node_info().values():
    if node.state == 0:
        print(node.node_manager_hostname)
"""


def task_yaml(name: str, zone: str | None = None, cpu: str = "1", retries: int = 0) -> str:
    labels = "" if zone is None else f", node_labels: {{zone: {zone}}}"
    return (
        f"- name: {name}\n"
        "  kind: TaskAPI\n"
        "  definition: {path: task.py}\n"
        f"  compute: {{cpu: {cpu}{labels}}}\n"
        f"  retries: {retries}\n"
    )


class Machines:
    """The machines of one test. Their names are the host names, and the names of Ray's nodes."""

    def __init__(self, made: Network) -> None:
        self.network = made
        self.shared = made.folder / "shared"
        self.shared.mkdir()
        self.operators: dict[str, Operator] = {}
        self.database: PostgreSQLServer
        self.files: S3Server
        self._bucket = ""
        self._database_url = ""
        self._starting: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._nodes: dict[str, list[str]] = {}
        self._stack = contextlib.ExitStack()

    @property
    def address(self) -> str:
        return f"{self.network.machines[HEAD].ip}:{PORT}"

    # What runs.

    def start_head(self) -> None:
        """Start the head on a machine that takes no jobs. Start it again after `kill_head`."""
        here = self._machine(HEAD).here
        self._start_ray(HEAD, ["--head", f"--port={PORT}", "--include-dashboard=false",
                               f"--temp-dir={here / 'ray'}", "--num-cpus=0"])  # fmt: skip
        self.await_ray()

    def add_node(self, name: str, labels: str = "", cpus: int = 2) -> None:
        """Start a node; return at once."""
        self._nodes[name] = [
            f"--address={self.address}", f"--num-cpus={cpus}", f"--labels={labels}",
        ]  # fmt: skip
        self.start_node(name)

    def start_node(self, name: str) -> None:
        """Start the raylet of a node, for the first time or again; return at once."""
        self._start_ray(name, self._nodes[name])

    def start_storage(self) -> None:
        """Start PostgreSQL and S3, each on a machine."""
        files = self._machine(FILES)
        self.files = S3Server(files.ip, files.popen)
        self._stack.callback(self.files.close)
        self._bucket = self.files.bucket()
        machine = self._machine(DATABASE)
        self.database = self._stack.enter_context(server())
        self.database.stop()
        self.database.popen = machine.popen
        self.database.settings["listen_addresses"] = machine.ip
        with (self.database.data / "pg_hba.conf").open("a") as hba:
            hba.write("host all all 0.0.0.0/0 scram-sha-256\n")
        self.database.start()
        url = self.database.url(self.database.create())
        self._database_url = url.replace("@/", f"@{machine.ip}:5432/").partition("?")[0]

    def start_operator(self, name: str, *options: str) -> Operator:
        """Start an operator on a machine of its own, with a data folder there."""
        self.add_node(name, cpus=0)
        self.await_ray()
        machine = self.network.machines[name]
        storage = ["--store", self._database_url, "--files", f"s3://{self._bucket}"]
        made = Operator(
            machine.folder,
            *("--host", machine.ip, "--insecure", "--grace", "1"),
            *("--engine", "ray", "--ray-address", self.address),
            *("--ray-node-dir", str(machine.here / "nodes")),
            *(storage if self._bucket else ()),
            *options,
        )
        made.popen = machine.popen
        if self._bucket:
            made.environment = self.files.environment
        self.operators[name] = made
        made.start()
        return made

    def await_ready(self, running: Operator, *names: str) -> None:
        """Wait until an operator shows these nodes as ready."""
        self.await_ray()
        until(
            lambda: all(self.node(running, name)["is_ready"] for name in names), "nodes are ready"
        )

    def node(self, running: Operator, name: str) -> Any:
        """A node, as an operator shows it."""
        nodes = running.http.get(f"{running.url}/-/cluster").json()["nodes"]
        unknown = {"name": name, "is_ready": False, "problem": None}
        return next((node for node in nodes if node["name"] == name), unknown)

    def alive(self) -> set[str]:
        """The nodes that Ray's head has as alive."""
        program = [sys.executable, "-c", _ALIVE, self.address]
        return set(self.network.machines[HEAD].run(*program).split())

    def marks(self) -> list[list[str]]:
        """Job, attempt and machine of each start of `TASK`."""
        file = self.shared / "marks"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def config(self, go: str | None = None) -> dict[str, str]:
        """The config of a job of `TASK`, which waits for `release(go)` if there is one."""
        waits = {} if go is None else {"go": str(self.shared / go)}
        return {"marks": str(self.shared / "marks"), **waits}

    def release(self, go: str) -> None:
        """Let the jobs that wait for this name end."""
        (self.shared / go).touch()

    # Faults.

    def pids(self, name: str, kind: str) -> list[int]:
        """The processes of a kind on a machine. A child that a process has forked counts only after
        it has executed a program."""
        found = self.network.machines[name].pids(kind)
        return [pid for pid in found if _parent(pid) not in found]

    def kill(self, name: str, kind: str) -> None:
        """Kill the processes of a kind on a machine."""
        pids = self.pids(name, kind)
        assert pids, f"{name} has no process {kind}"
        for pid in pids:
            _signal(pid, signal.SIGKILL)

    def stop(self, name: str, kind: str) -> Callable[[], None]:
        """Stop the processes of a kind on a machine; what continues them."""
        pids = self.pids(name, kind)
        assert pids, f"{name} has no process {kind}"
        for pid in pids:
            _signal(pid, signal.SIGSTOP)

        def resume() -> None:
            for pid in pids:
                _signal(pid, signal.SIGCONT)

        return resume

    @contextlib.contextmanager
    def stopped(self, name: str, kind: str) -> Iterator[None]:
        """The processes of a kind hang for the duration of the block."""
        resume = self.stop(name, kind)
        try:
            yield
        finally:
            resume()

    @contextlib.contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """A machine receives and sends nothing for the duration of the block."""
        self.network.cut(name)
        try:
            yield
        finally:
            self.network.heal(name)

    def kill_head(self) -> None:
        """Kill all processes of Ray's head. `start_head` makes a new cluster at its address."""
        self.kill_node(HEAD)

    def kill_node(self, name: str) -> None:
        """Kill all processes of a node's machine, jobs included, as a power failure does."""
        self._starting.pop(name, None)
        self.network.machines[name].end_processes()

    # The end.

    def stop_operators(self) -> None:
        """Stop the operators, and check their exit codes and logs."""
        for each in self.operators.values():
            if each.process.poll() is None:
                code = each.stop()
                log = each.log.read_text()
                assert code == 0, log
                assert "Traceback" not in log, log

    def end(self) -> None:
        """End all processes, and remove what they made outside of the network's folder."""
        for running in self.operators.values():
            running.kill()
            running.http.close()
        try:
            for name in {*self._nodes, HEAD} & set(self.network.machines):
                machine = self.network.machines[name]
                machine.end_processes()
                agents = machine.folder.glob("nodes/*/*/jobs")
                machine.remove_groups(
                    [machine.here / each.relative_to(machine.folder) for each in agents]
                )
        finally:
            self._stack.close()

    def show_logs(self) -> None:
        """Print the ends of the operators' logs, which pytest shows when a test fails."""
        for name, running in self.operators.items():
            if running.log.exists():
                lines = running.log.read_text().splitlines()[-LOG_LINES:]
                print(f"--- the log of {name}", *lines, sep="\n")

    def _machine(self, name: str) -> Machine:
        return self.network.machines.get(name) or self.network.add(name)

    def _start_ray(self, name: str, arguments: list[str]) -> None:
        machine = self._machine(name)
        log = machine.folder / "ray-start.log"
        env = {**os.environ, **SMALL, "HOME": str(machine.here)}
        env.pop("RAY_ADDRESS", None)
        command = [
            str(RAY), "start", f"--node-ip-address={machine.ip}", "--disable-usage-stats",
            "--num-gpus=0", f"--memory={4096 * MIB}", f"--object-store-memory={80 * MIB}",
            "--include-log-monitor=false", *arguments,
        ]  # fmt: skip
        with log.open("wb") as output:
            started = machine.popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._starting[name] = started, log

    def await_ray(self) -> None:
        """Wait until every `ray start` has done its work."""
        while self._starting:
            _, (started, log) = self._starting.popitem()
            assert started.wait(START_TIMEOUT_S) == 0, log.read_text()


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    """An empty network. At the end nothing of the machines is left."""
    with network() as made:
        run = Machines(made)
        try:
            yield run
            run.stop_operators()
        except BaseException:
            run.show_logs()
            raise
        finally:
            run.end()


def seconds_until(condition: Callable[[], object], limit_s: float, what: str) -> float:
    """Wait until a condition holds; the seconds that it took, which are printed."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.1)
    lasted = time.monotonic() - start
    print(f"{what}: {lasted:.1f} s")
    return lasted


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
