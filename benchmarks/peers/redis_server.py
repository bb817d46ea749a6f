"""A Redis that syncs every write before it answers, so that what it has acknowledged is as durable as
what our store has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import running


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """The path of its socket."""
    path = folder / "redis.sock"
    command: list[str | Path] = [
        "redis-server", "--port", "0", "--unixsocket", path, "--dir", folder, "--save", "",
        "--appendonly", "yes", "--appendfsync", "always",
    ]  # fmt: skip
    with running(command, folder=folder, ready="ready to accept connections"):
        yield str(path)
