"""A proxy between clients and an operator that the test kills and restarts."""

from __future__ import annotations

import socket
import threading

from network_gate import NetworkGate
from operator_harness import Operator


class OperatorProxy(NetworkGate):
    """Connects to the operator's current port, and can lose the answers to submits."""

    def __init__(self, running: Operator) -> None:
        super().__init__(socket.create_server(("127.0.0.1", 0)), self._to_operator)
        self.running = running
        self.long_poll_arrived = threading.Event()
        """Set when a long poll has arrived."""
        self.refused_connections = 0
        self.answers_to_lose = 0
        self.lost_answers: list[bytes] = []

    def forward(self, data: bytes, server: socket.socket) -> bool:
        super().forward(data, server)
        if b"?wait=" in data:
            self.long_poll_arrived.set()
        # The client sends the body after the header, in a write of its own.
        if not self.answers_to_lose or not data.endswith(b'{"config":{"do":"echo"}}'):
            return True
        self.answers_to_lose -= 1
        self.lost_answers.append(server.recv(65536))
        return False

    def _to_operator(self) -> socket.socket:
        try:
            return socket.create_connection(("127.0.0.1", int(self.running.url.rpartition(":")[2])))
        except OSError:
            self.refused_connections += 1
            raise
