"""A measured service, ours or a peer, which accepts jobs at an HTTP endpoint. `one_round` sends it
requests; `ours` and `peers` start each service and adapt its requests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from load import Connection, request

HERE = Path(__file__).parent
_START_S = 30
_END_S = 15


class Service:
    """A service with three tasks. `noop` returns the time of its first line. `later` does not
    start. `sleeper` writes its pid to the fifo that its config names, and sleeps."""

    name: str
    url: str
    max_running: int
    """The number of jobs that it runs at the same time, at most."""
    share = 1.0
    """The part of a round's jobs that it gets: less where a job takes long."""
    poll_interval_s = 0.02
    """Of a service without long polls. Polls are rare, because they slow the service down."""

    def submit(self, task: str, config: Mapping[str, object] | None = None) -> bytes:
        """The request that submits a job."""
        body = json.dumps({} if config is None else {"config": config})
        return request(self.url, "POST", f"/{task}", body.encode())

    def status(self, task: str, job_id: str) -> bytes:
        """The request that asks for a job's status."""
        return request(self.url, "GET", f"/{task}/{job_id}")

    def stop(self, task: str, job_id: str) -> bytes:
        """The request that stops a job."""
        return request(self.url, "DELETE", f"/{task}/{job_id}")

    def job_id(self, answer: bytes) -> str:
        """The id in the answer to a submit."""
        return str(json.loads(answer)["job_id"])

    def result(self, answer: bytes) -> Any:
        """The result in a job's status; None while it is not done. Raises if the job failed."""
        raise NotImplementedError

    def finish(self, connection: Connection, task: str, job_id: str) -> Any:
        """Wait until a job is done, and return its result."""
        while (result := self.result(connection.send(self.status(task, job_id)))) is None:
            time.sleep(self.poll_interval_s)
        return result


@contextmanager
def running(
    command: Sequence[str | Path],
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    ready: str | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A program in its own session, and the first line of its output that contains `ready`. Its
    processes end with the block."""
    log = folder / f"{Path(command[0]).name}-{len(list(folder.iterdir()))}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield process, "" if ready is None else _await_line(process, ready, log)
    finally:
        _end(process)


def _await_line(process: subprocess.Popen[bytes], ready: str, log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            if ready in line and line.endswith("\n"):
                return line
        time.sleep(0.002)
    raise RuntimeError(f"{log.name} does not start: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    others = descendants(process.pid)
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + _END_S
    while alive := [pid for pid in others if os.path.exists(f"/proc/{pid}")]:
        if time.monotonic() > deadline:
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.01)


def children_by_parent() -> dict[int, list[int]]:
    """All processes by their parents."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                text = Path(f"/proc/{entry}/stat").read_text()
                parent = int(text.rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry))
    return found


def descendants(root: int) -> list[int]:
    """The descendants of a process."""
    below = children_by_parent()
    found = [root]
    for pid in found:
        found += below.get(pid, [])
    return found[1:]
