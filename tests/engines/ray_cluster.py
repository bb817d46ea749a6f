"""A real Ray cluster on this machine: a head, and more raylets beside it, each a node of its own."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
RAY = Path(sys.executable).parent / "ray"
# What makes it light, and lets it see soon what is dead.
SETTINGS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
}


@dataclass
class RayCluster:
    """Its processes are known by their session folder, which stands in the command line of each."""

    folder: Path
    port: int
    env: dict[str, str]
    raylets: dict[str, int] = field(default_factory=dict)
    """Raylets that were started, by a name of the test's: their pids."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_head(self, cpus: int = 8, gpus: int = 2) -> None:
        self._start(
            "head", "--head", f"--port={self.port}", "--include-dashboard=false",
            f"--temp-dir={self.folder}", f"--num-cpus={cpus}", f"--num-gpus={gpus}",
        )  # fmt: skip

    def add(self, name: str, cpus: int = 8, labels: str = "") -> None:
        self._start(
            name, f"--address={self.address}", f"--num-cpus={cpus}", "--num-gpus=0",
            f"--labels={labels}",
        )  # fmt: skip

    def node_id(self, name: str) -> str:
        """What Ray calls the node of a raylet."""
        command = Path(f"/proc/{self.raylets[name]}/cmdline").read_text()
        found = re.search(r"--node_id=(\w+)", command)
        assert found is not None, command
        return found[1]

    def kill(self, name: str) -> None:
        """Kill a raylet, as a machine that is gone; its workers end with it."""
        os.kill(self.raylets.pop(name), signal.SIGKILL)

    def kill_head(self) -> None:
        """Kill all of the head: the cluster's memory, and the raylet beside it."""
        for pid, command in self._processes():
            if "gcs_server" in command:
                os.kill(pid, signal.SIGKILL)
        self.kill("head")

    def raylets_left(self) -> list[int]:
        found = [pid for pid, command in self._processes() if "raylet/raylet" in command]
        # What one has forked looks like it until it executes its program.
        return [pid for pid in found if _parent(pid) not in (None, *found)]

    @contextlib.contextmanager
    def head_stopped(self) -> Iterator[None]:
        """The cluster's memory hangs: it takes connections, and answers nobody."""
        held = [pid for pid, command in self._processes() if "gcs_server" in command]
        for pid in held:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in held:
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def raylet_stopped(self, node_id: str) -> Iterator[None]:
        """The raylet of a node hangs: until it goes on, it starts no process in place of one that has died."""
        (pid,) = (pid for name, pid in self.raylets.items() if self.node_id(name) == node_id)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        until = time.monotonic() + 20
        while (left := self._processes()) and time.monotonic() < until:
            for pid, _ in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self.raylets.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *arguments: str) -> None:
        before = self.raylets_left()
        done = subprocess.run(
            [
                RAY, "start", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
                f"--memory={4096 * MIB}", f"--object-store-memory={80 * MIB}",
                "--min-worker-port=0", "--max-worker-port=0", "--include-log-monitor=false", *arguments,
            ],
            env=self.env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (self.raylets[name],) = set(self.raylets_left()).difference(before)

    def _processes(self) -> list[tuple[int, str]]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    about = command + (entry / "environ").read_bytes().decode(errors="replace")
                    if str(self.folder) in about and not _is_zombie(entry):
                        found.append((int(entry.name), command))
        return found


@contextlib.contextmanager
def cluster(*names: str) -> Iterator[RayCluster]:
    """A head, and a raylet more for each name."""
    # Ray's sockets lie below it, and a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="ct-ray-", dir="/tmp"))
    env = {**os.environ, **SETTINGS, "CORTEX_TEST_CLUSTER": str(folder)}
    env.pop("RAY_ADDRESS", None)
    made = RayCluster(folder, _port(), env)
    try:
        made.start_head()
        for name in names:
            made.add(name)
        yield made
    finally:
        made.end()


def _is_zombie(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _port() -> int:
    """A free one that no worker of Ray's is given, nor the kernel gives to anybody meanwhile."""
    while True:
        port = random.randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
