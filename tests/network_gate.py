"""A TCP proxy that can be shut, for tests of lost connections.

`chaos.postgresql_proxy` adds faults in the middle of PostgreSQL's commits.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class NetworkGate:
    """Forwards bytes between clients and a server.

    Shutting the gate closes all connections; a shut gate closes each new connection at once.
    """

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self.is_open = True
        """Whether the gate accepts new connections."""
        self.shut_before = b""
        """The gate shuts once, instead of forwarding these bytes from a client. Empty: never."""
        self._listener = listener
        self._connect = connect
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    @property
    def url(self) -> str:
        """The URL of a gate that listens on a port."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def shut(self) -> None:
        self.is_open = False
        for each in list(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.shut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def forward(self, data: bytes, server: socket.socket) -> bool:
        """Forward bytes of a client to the server; whether to keep the connection."""
        shut_before = self.shut_before  # another thread may clear the attribute meanwhile
        if shut_before and shut_before in data:
            self.shut_before = b""
            self.shut()
            return False
        server.sendall(data)
        return True

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._run(self._pass_on, client)

    def _pass_on(self, client: socket.socket) -> None:
        with client, suppress(OSError), self._connect() as server:
            both = {client, server}
            self._sockets |= both
            try:
                if self.is_open:  # checked after registration: `shut` closes all registered sockets
                    self._until_closed(client, server)
            finally:
                self._sockets -= both

    def _until_closed(self, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    source = server if key.fileobj is server else client
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is server:
                        client.sendall(data)
                    elif not self.forward(data, server):
                        return

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


@contextmanager
def network_gate(port: int) -> Iterator[NetworkGate]:
    """A gate to a port of this machine, for the duration of the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    made = NetworkGate(listener, lambda: socket.create_connection(("127.0.0.1", port)))
    try:
        yield made
    finally:
        made.close()
