"""A real Ray cluster on this machine: a head, and more raylets, each of which is a node."""

from __future__ import annotations

import contextlib
import json
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
# Without these, the cluster takes more memory.
SMALL = {
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
}
# Without these, the cluster notices the death of a node much later. `tests/cluster` has Ray's own.
SETTINGS = {
    **SMALL,
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "6000",
    "RAY_health_check_failure_threshold": "5",
}


FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
FAKE_HEAD_ID = f"{'f' * 51}00000"
FAKE_HEAD_TYPE = "ray.head.default"
COMMANDS = (
    "cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands",
    "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


@dataclass
class RayCluster:
    """A cluster. The command line of each of its processes names its session folder."""

    folder: Path
    port: int
    env: dict[str, str]
    raylets: dict[str, int] = field(default_factory=dict)
    """The pid of each raylet that was started, by the name that the test gave it."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_head(self, cpus: int = 8, gpus: int = 2) -> None:
        self._start(
            "head", "--head", f"--port={self.port}", "--include-dashboard=false",
            f"--temp-dir={self.folder}", f"--num-cpus={cpus}", f"--num-gpus={gpus}",
        )  # fmt: skip

    def start_autoscaling_head(self, node_types: dict[str, dict[str, object]]) -> None:
        """A head with an autoscaler, which adds raylets on this machine and removes idle ones.

        Args:
            node_types: as in the configuration of Ray's autoscaler.
        """
        head = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}
        configuration = {
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in COMMANDS},
            "cluster_name": "fake", "max_workers": 4, "idle_timeout_minutes": 0.1,
            "head_node_type": FAKE_HEAD_TYPE,
            "available_node_types": {FAKE_HEAD_TYPE: head, **node_types},
            # Ray's own provider for tests; by its short name, it needs a file that wheels lack.
            "provider": {
                "type": "external", "module": FAKE_PROVIDER, "gcs_address": self.address,
                "launch_multiple": True, "head_node_id": FAKE_HEAD_ID, "use_node_id_as_ip": True,
                "disable_node_updaters": True, "disable_launch_config_check": True,
            },
        }  # fmt: skip
        path = self.folder / "autoscaler.json"
        path.write_text(json.dumps(configuration))
        self.env |= {
            "RAY_enable_autoscaler_v2": "1", "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_ID,
        }  # fmt: skip
        self._start(
            "head", "--head", f"--port={self.port}", "--include-dashboard=false",
            f"--temp-dir={self.folder}", "--num-cpus=1", f"--autoscaling-config={path}",
        )  # fmt: skip

    def add(self, name: str, cpus: int = 8, labels: str = "") -> None:
        self._start(
            name, f"--address={self.address}", f"--num-cpus={cpus}", "--num-gpus=0",
            f"--labels={labels}",
        )  # fmt: skip

    def node_id(self, name: str) -> str:
        """Ray's id of a raylet's node."""
        command = Path(f"/proc/{self.raylets[name]}/cmdline").read_text()
        found = re.search(r"--node_id=(\w+)", command)
        assert found is not None, command
        return found[1]

    def kill(self, name: str) -> None:
        """Kill a raylet, and with it its workers: as if its machine were lost."""
        os.kill(self.raylets.pop(name), signal.SIGKILL)

    def terminate(self, name: str) -> None:
        """Send SIGTERM to a raylet, as the platform of its machine does."""
        os.kill(self.raylets.pop(name), signal.SIGTERM)

    def drain(self, name: str, deadline_s: int, reason: str = "PREEMPTION") -> None:
        """Announce that a node is going to end."""
        done = subprocess.run(
            [
                RAY, "drain-node", f"--address={self.address}", f"--node-id={self.node_id(name)}",
                f"--reason=DRAIN_NODE_REASON_{reason}", "--reason-message=maintenance",
                f"--deadline-remaining-seconds={deadline_s}",
            ],
            env=self.env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def kill_head(self) -> None:
        """Kill the head: the cluster's memory (GCS) and the head's raylet."""
        for pid, command in self._processes():
            if "gcs_server" in command:
                os.kill(pid, signal.SIGKILL)
        self.kill("head")

    def live_raylets(self) -> list[int]:
        raylets = [pid for pid, command in self._processes() if "raylet/raylet" in command]
        # A child of a raylet has the raylet's command line until it executes its own program.
        return [pid for pid in raylets if _parent(pid) not in (None, *raylets)]

    @contextlib.contextmanager
    def head_stopped(self) -> Iterator[None]:
        """The cluster's memory (GCS) hangs: it accepts connections, and answers no call."""
        pids = [pid for pid, command in self._processes() if "gcs_server" in command]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def other_versions(self) -> Iterator[None]:
        """The head says that the cluster runs another version of Ray."""
        code = (
            "import json, sys; from ray._raylet import GcsClient; "
            "gcs = GcsClient(address=sys.argv[1]); name = b'CLUSTER_METADATA', b'cluster'; "
            "about = json.loads(gcs.internal_kv_get(*name, timeout=60)); "
            "about['ray_version'], before = sys.argv[2], about['ray_version']; "
            "gcs.internal_kv_put(name[0], json.dumps(about).encode(), True, name[1], timeout=60); "
            "print(before)"
        )

        def claim(version: str) -> str:
            command = [sys.executable, "-c", code, self.address, version]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            return done.stdout.strip()

        before = claim("1.0.0")
        try:
            yield
        finally:
            claim(before)

    @contextlib.contextmanager
    def raylet_stopped(self, node_id: str) -> Iterator[None]:
        """The raylet of a node hangs: it replaces no dead process until it continues."""
        (pid,) = (pid for name, pid in self.raylets.items() if self.node_id(name) == node_id)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def shut_down(self) -> None:
        until = time.monotonic() + 20
        while (left := self._processes()) and time.monotonic() < until:
            for pid, _ in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self.raylets.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *arguments: str) -> None:
        before = self.live_raylets()
        done = subprocess.run(
            [
                RAY, "start", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
                f"--memory={4096 * MIB}", f"--object-store-memory={80 * MIB}",
                "--min-worker-port=0", "--max-worker-port=0", "--include-log-monitor=false", *arguments,
            ],
            env=self.env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (self.raylets[name],) = set(self.live_raylets()).difference(before)

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
def cluster(*names: str, cpus: int = 8) -> Iterator[RayCluster]:
    """A head with so many cores, and one more raylet for each name."""
    with absent_cluster() as made:
        made.start_head(cpus)
        for name in names:
            made.add(name)
        yield made


@contextlib.contextmanager
def absent_cluster() -> Iterator[RayCluster]:
    """A cluster that has no head and no node yet."""
    # Ray makes its sockets below this folder, and a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ct-ray-", dir="/tmp"))
    env = {**os.environ, **SETTINGS, "CORTEX_TEST_CLUSTER": str(folder)}
    env.pop("RAY_ADDRESS", None)
    made = RayCluster(folder, _port(), env)
    try:
        yield made
    finally:
        made.shut_down()


def _is_zombie(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _port() -> int:
    """A free port outside the ranges from which Ray's workers and the kernel take ports."""
    while True:
        port = random.randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
