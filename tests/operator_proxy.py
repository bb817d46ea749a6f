"""The way of clients to an operator that is killed and comes back."""

from __future__ import annotations

import socket
import threading

from network_gate import NetworkGate
from operator_harness import Operator


class OperatorProxy(NetworkGate):
    """The way to an operator, whichever port it has when it is back. It loses answers to submits."""

    def __init__(self, running: Operator) -> None:
        super().__init__(socket.create_server(("127.0.0.1", 0)), self._to_operator)
        self.running = running
        self.waits = threading.Event()
        """Set once a long poll has come."""
        self.refused = 0
        self.to_lose = 0
        self.lost: list[bytes] = []

    def sent(self, data: bytes, server: socket.socket) -> bool:
        super().sent(data, server)
        if b"?wait=" in data:
            self.waits.set()
        # The body comes after the header, and alone.
        if not self.to_lose or not data.endswith(b'{"config":{"do":"echo"}}'):
            return True
        self.to_lose -= 1
        self.lost.append(server.recv(65536))
        return False

    def _to_operator(self) -> socket.socket:
        try:
            return socket.create_connection(("127.0.0.1", int(self.running.url.rpartition(":")[2])))
        except OSError:
            self.refused += 1
            raise
