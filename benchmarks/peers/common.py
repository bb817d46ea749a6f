"""How the programs of the peers are started: in their own environment, with this folder's modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from load import Connection
from service import HERE, Service, running

PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
_WARM = 5


@contextmanager
def worker(command: list[str], folder: Path, env: Mapping[str, str]) -> Iterator[None]:
    """One of the programs that are installed with a peer."""
    path = f"{PYTHON.parent}:/usr/local/bin:/usr/bin:/bin"
    own = {**env, "PYTHONPATH": str(HERE), "PATH": path, "TMPDIR": str(folder)}
    program = PYTHON.with_name(command[0])
    with running([program, *command[1:]], folder=folder, env=own):
        yield


@contextmanager
def endpoint(app: str, folder: Path, env: Mapping[str, str]) -> Iterator[str]:
    """A FastAPI app on the fastest server that uvicorn comes with; its URL."""
    command: list[str | Path] = [PYTHON, "-m", "peers.server", app]
    own = {**env, "PYTHONPATH": str(HERE)}
    with running(command, folder=folder, env=own, ready="http://") as (_, line):
        yield line.strip()


def warm_up(service: Service) -> None:
    """Have it do some jobs: its workers run then, and have imported what they need."""
    with Connection(service.url) as connection:
        for _ in range(_WARM):
            job_id = service.job_id(connection.send(service.submit("noop")))
            service.finish(connection, "noop", job_id)
