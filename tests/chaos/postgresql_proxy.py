"""A proxy in front of a PostgreSQL server. A test makes it lose a connection during a commit."""

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
    """Accepts connections on a socket in its own folder."""

    def __init__(self, server: Path, folder: Path) -> None:
        self.folder = folder
        self.cut: str | None = None
        """Whether to lose the connection of the next commit: `before` the server receives it, or
        `after` the server made it."""
        self.closes_after_cut = False
        """Whether the proxy accepts no connections after the cut."""
        self.is_mute = False
        """Whether the proxy forwards nothing that clients send."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / _SOCKET))
        listener.listen()
        super().__init__(listener, lambda: _connected(server / _SOCKET))

    @property
    def has_cut(self) -> bool:
        """Whether the proxy has lost the connection."""
        return self.cut is None

    def forward(self, data: bytes, server: socket.socket) -> bool:
        while self.is_mute:
            time.sleep(0.02)
        if self.cut is None or _COMMIT not in data:
            return super().forward(data, server)
        cut, self.cut = self.cut, None
        if cut == "after":
            server.sendall(data)
            server.recv(65536)
        self.is_open = not self.closes_after_cut
        return False


def _connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    return made


@contextmanager
def postgresql_proxy(server: Path) -> Iterator[PostgreSQLProxy]:
    """A proxy while the block runs."""
    with tempfile.TemporaryDirectory(prefix="px-") as folder:
        made = PostgreSQLProxy(server, Path(folder))
        try:
            yield made
        finally:
            made.close()
