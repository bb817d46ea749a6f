"""Starts the programs of the peers in their own environment, with this folder's modules."""

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
    """A program of a peer, while the block runs."""
    path = f"{PYTHON.parent}:/usr/local/bin:/usr/bin:/bin"
    own = {**env, "PYTHONPATH": str(HERE), "PATH": path, "TMPDIR": str(folder)}
    program = PYTHON.with_name(command[0])
    with running([program, *command[1:]], folder=folder, env=own):
        yield


@contextmanager
def endpoint(app: str, folder: Path, env: Mapping[str, str]) -> Iterator[str]:
    """The URL of a FastAPI app on the fastest server that uvicorn offers."""
    command: list[str | Path] = [PYTHON, "-m", "peers.server", app]
    own = {**env, "PYTHONPATH": str(HERE)}
    with running(command, folder=folder, env=own, ready="http://") as (_, line):
        yield line.strip()


def warm_up(service: Service) -> None:
    """Run some jobs: afterwards the service's workers run and have done their imports."""
    with Connection(service.url) as connection:
        for _ in range(_WARM):
            job_id = service.job_id(connection.send(service.submit("noop")))
            service.finish(connection, "noop", job_id)
