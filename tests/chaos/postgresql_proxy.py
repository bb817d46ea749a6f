"""A proxy in front of a PostgreSQL server that loses connections at the worst moment, when told to."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from network_gate import NetworkGate

_SOCKET = ".s.PGSQL.5432"
_COMMIT = b"COMMIT\0"


class PostgreSQLProxy(NetworkGate):
    """Takes connections on a socket in a folder of its own."""

    def __init__(self, server: Path, folder: Path) -> None:
        self.folder = folder
        self.cut: str | None = None
        """Whether to lose the connection of the next commit: `before` the server has it, or `after`
        it was made."""
        self.goes_away = False
        """Whether it takes no connections from then on."""
        self.is_mute = False
        """Whether nothing that clients send gets there."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / _SOCKET))
        listener.listen()
        super().__init__(listener, lambda: _connected(server / _SOCKET))

    @property
    def has_cut(self) -> bool:
        """Whether the connection that was to be lost was."""
        return self.cut is None

    def sent(self, data: bytes, server: socket.socket) -> bool:
        while self.is_mute:
            time.sleep(0.02)
        if self.cut is None or _COMMIT not in data:
            return super().sent(data, server)
        cut, self.cut = self.cut, None
        if cut == "after":
            server.sendall(data)
            server.recv(65536)
        self.is_open = not self.goes_away
        return False


def _connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    return made


@contextmanager
def postgresql_proxy(server: Path) -> Iterator[PostgreSQLProxy]:
    """A proxy for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="px-") as folder:
        made = PostgreSQLProxy(server, Path(folder))
        try:
            yield made
        finally:
            made.close()
