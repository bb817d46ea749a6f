"""Ray Jobs: a head node on this machine, through its own REST interface. A job is a shell command,
which starts sooner than an interpreter would. It runs two jobs a second: a few are enough to
measure."""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from load import Connection, RequestFailed, request
from peers import common
from service import Service


class RayJobs(Service):
    """A running head node."""

    name = "Ray Jobs"
    max_running = 1000
    share = 0.02

    def __init__(self, url: str) -> None:
        self.url = url

    def submit(self, task: str, config: Mapping[str, object] | None = None) -> bytes:
        entrypoint = "date +%s%N"
        if task == "sleeper":
            assert config is not None
            entrypoint = f"sh -c 'echo $$ > {config['fifo']}; exec sleep 300'"
        body = json.dumps({"entrypoint": entrypoint})
        return request(self.url, "POST", "/api/jobs/", body.encode())

    def status(self, task: str, job_id: str) -> bytes:
        return request(self.url, "GET", f"/api/jobs/{job_id}")

    def stop(self, task: str, job_id: str) -> bytes:
        return request(self.url, "POST", f"/api/jobs/{job_id}/stop")

    def job_id(self, answer: bytes) -> str:
        return str(json.loads(answer)["submission_id"])

    def result(self, answer: bytes) -> Any:
        job = json.loads(answer)
        if job["status"] in ("FAILED", "STOPPED"):
            raise RuntimeError(f"a job did not succeed: {job}")
        return job["status"] if job["status"] == "SUCCEEDED" else None

    def finish(self, connection: Connection, task: str, job_id: str) -> Any:
        """Wait until a job is done, and return the number that it printed among Ray's lines."""
        super().finish(connection, task, job_id)
        logs = connection.ask("GET", f"/api/jobs/{job_id}/logs")["logs"]
        numbers = [line for line in logs.splitlines() if line.isdigit()]
        if not numbers:
            raise RuntimeError(f"a job has printed no time: {logs}")
        return numbers[0]


@contextmanager
def opened(folder: Path) -> Iterator[Service]:
    """Ray's head node, while the block runs."""
    # A short path: the paths of Ray's sockets may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="r") as short:
        dashboard = _free_port()
        command = [
            "ray", "start", "--head", "--block", "--disable-usage-stats", "--temp-dir", short,
            "--port", str(_free_port()), "--dashboard-port", str(dashboard),
            "--dashboard-agent-listen-port", str(_free_port()),
            "--dashboard-agent-grpc-port", str(_free_port()),
            "--runtime-env-agent-port", str(_free_port()),
            "--metrics-export-port", str(_free_port()),
            "--min-worker-port", "0", "--max-worker-port", "0", "--include-dashboard", "true",
        ]  # fmt: skip
        with common.worker(command, folder, {}):
            ray = RayJobs(f"http://127.0.0.1:{dashboard}")
            _await_answer(ray)
            common.warm_up(ray)
            yield ray


def _await_answer(ray: RayJobs, timeout_s: float = 60) -> None:
    """Wait until the REST interface answers, and the agent behind it accepts a job."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with Connection(ray.url) as connection:
                connection.send(ray.submit("noop"))
                return
        except (OSError, RequestFailed):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
