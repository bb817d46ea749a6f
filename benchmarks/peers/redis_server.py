"""A Redis that syncs every write before it answers: its acknowledged writes are as durable as our
store's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import running


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """The path of a Redis server's socket, while the block runs."""
    path = folder / "redis.sock"
    command: list[str | Path] = [
        "redis-server", "--port", "0", "--unixsocket", path, "--dir", folder, "--save", "",
        "--appendonly", "yes", "--appendfsync", "always",
    ]  # fmt: skip
    with running(command, folder=folder, ready="ready to accept connections"):
        yield str(path)
