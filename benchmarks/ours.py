"""Our operator, started by `cortex serve`, with the measured tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cortex import Client
from kinds import CORES
from load import Connection, request
from service import Service, running

CORTEX = Path(sys.executable).with_name("cortex")
MAX_RUNNING = 50
CPU = 1000
LOCAL = ("--cpu", str(CPU))
_WAIT_S = 60
_FINISHING = ("noop", "learner", "learner-ahead")

_FILES = {
    "noop.py": (
        "import time\n\n\ndef task(config):\n"
        "    now = time.time_ns()\n    print(now)\n    return now\n"
    ),
    "sleeper.py": (
        "import os, time\n\n\ndef task(config):\n"
        "    if 'fifo' in config:\n"
        "        fd = os.open(config['fifo'], os.O_WRONLY)\n"
        "        os.write(fd, f'{os.getpid()}\\n'.encode())\n"
        "        os.close(fd)\n"
        "    time.sleep(300)\n"
    ),
    "learner.py": (
        "import os, time\nimport sklearn.linear_model\n\n\ndef task(config):\n"
        "    now = time.time_ns()\n"
        "    if 'fifo' in config:\n"
        "        fd = os.open(config['fifo'], os.O_WRONLY)\n"
        "        os.write(fd, f'{os.getpid()}\\n'.encode())\n"
        "        os.close(fd)\n"
        "        time.sleep(300)\n"
        "    return now\n"
    ),
}
_LEARNER = "sklearn.linear_model"
_REQUIREMENTS = "scikit-learn>=1.7,<2\n"
_APIS = {
    "noop": ("path: noop.py", f"compute: {{cpu: {CPU // MAX_RUNNING}}}"),
    "later": ("path: sleeper.py", f"compute: {{cpu: {CPU}}}"),
    "sleeper": ("path: sleeper.py", "compute: {cpu: 500m}"),
    "queued": ("path: sleeper.py", "compute: {cpu: 1}, limits: {max_running: 1}"),
    "learner": ("path: learner.py", f"compute: {{cpu: {CPU // CORES}}}"),
    "learner-ahead": (
        f"path: learner.py, preload: [{_LEARNER}]",
        f"compute: {{cpu: {CPU // CORES}}}",
    ),
}


class Cortex(Service):
    """A running operator."""

    name = "ours"
    max_running = MAX_RUNNING

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self.pid = pid

    def result(self, answer: bytes) -> Any:
        job = json.loads(answer)["job_status"]
        if job["status"] == "status_running":
            return None
        if job["status"] != "status_succeeded":
            raise RuntimeError(f"a job did not succeed: {job}")
        return job["result"]

    def finish(self, connection: Connection, task: str, job_id: str) -> Any:
        """Wait for a job by long polls, and return its result."""
        asked = request(self.url, "GET", f"/{task}/{job_id}?wait={_WAIT_S}")
        while (result := self.result(connection.send(asked))) is None:
            pass
        return result

    def deploy(self, folder: Path, names: Sequence[str]) -> None:
        """Deploy some of the tasks by the client, as users do."""
        project = folder / "project"
        project.mkdir(exist_ok=True)
        for file, text in _FILES.items():
            (project / file).write_text(text)
        if any("learner" in name for name in names):
            (project / "requirements.txt").write_text(_REQUIREMENTS)
        entries = [
            f"- {{name: {name}, kind: TaskAPI, definition: {{{definition}}}, {rest}}}\n"
            for name, (definition, rest) in ((name, _APIS[name]) for name in names)
        ]
        (project / "cortex.yaml").write_text("".join(entries))
        with Client(self.url) as client:
            for deployed in client.deploy(project / "cortex.yaml"):
                if deployed["error"]:
                    raise RuntimeError(deployed["error"])
        with Connection(self.url) as connection:
            for name in names:
                # Afterwards its environment is built and its fork server warm.
                for _ in range(5 if name in _FINISHING else 0):
                    self.finish(connection, name, self.job_id(connection.send(self.submit(name))))

    def undeploy(self, name: str) -> None:
        """Delete an API, which stops its jobs."""
        with Connection(self.url) as connection:
            connection.ask("DELETE", f"/-/apis/{name}")

    def names(self) -> list[str]:
        """The names of the deployed APIs."""
        with Connection(self.url) as connection:
            return [api["spec"]["name"] for api in connection.ask("GET", "/-/apis")]


@contextmanager
def serving(
    folder: Path, engine: Sequence[str] = LOCAL, store: str | None = None
) -> Iterator[Cortex]:
    """An operator on a data folder, new or existing, below `folder`.

    Args:
        engine: the options of `cortex serve` for its engine.
        store: the URL of its database; None for SQLite in the data folder.
    """
    folder.mkdir(exist_ok=True)
    command: list[str | Path] = [
        CORTEX, "serve", "--port", "0", "--data-dir", folder / "data", "--grace", "2", *engine,
        *(["--store", store] if store else []),
    ]  # fmt: skip
    with running(command, folder=folder, ready=" listening on ") as (process, line):
        yield Cortex(line.split()[-1], process.pid)


@contextmanager
def operator(
    folder: Path,
    names: Sequence[str] = (),
    engine: Sequence[str] = LOCAL,
    store: str | None = None,
) -> Iterator[Cortex]:
    """An operator with some of the tasks. Its jobs end with it."""
    with serving(folder, engine, store) as cortex:
        try:
            cortex.deploy(folder, names)
            yield cortex
        finally:
            for name in cortex.names():
                cortex.undeploy(name)
