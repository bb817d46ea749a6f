"""A client that costs little, since it shares the cores with the measured service: HTTP/1.1 over
kept-alive sockets, one request at a time on each, no pipelining. All services are measured with it.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CONNECTIONS = 16
_SIZE = 1 << 18
_ANSWER_TIMEOUT_S = 90


class RequestFailed(Exception):
    """A request got no answer, or an answer other than 200."""


def request(url: str, method: str, path: str, body: bytes = b"") -> bytes:
    """The bytes of a request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


class Connection:
    """One kept-alive connection that waits for each answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._socket = _connect(url)
        self._socket.settimeout(_ANSWER_TIMEOUT_S)

    def send(self, data: bytes) -> bytes:
        """Send a request, and return the body of its answer."""
        self._socket.sendall(data)
        received = b""
        while (body := _body(received)) is None:
            part = self._socket.recv(_SIZE)
            if not part:
                raise RequestFailed(f"{self._url} closed the connection after {received!r}")
            received += part
        return body

    def json(self, data: bytes) -> Any:
        """Send a request, and return the JSON of its answer."""
        return json.loads(self.send(data))

    def ask(self, method: str, path: str, body: bytes = b"") -> Any:
        """Make and send a request, and return the JSON of its answer."""
        return self.json(request(self._url, method, path, body))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Flood:
    """The answers to many requests."""

    bodies: list[bytes]
    latencies_s: list[float]
    elapsed_s: float

    @property
    def rate(self) -> float:
        return len(self.bodies) / self.elapsed_s


def flood(url: str, requests: Iterable[bytes], connections: int = CONNECTIONS) -> Flood:
    """Send requests over several connections. Each sends its next request after its last answer."""
    remaining = iter(requests)
    bodies: list[bytes] = []
    latencies: list[float] = []
    sockets = {sock.fileno(): sock for sock in (_connect(url) for _ in range(connections))}
    received = dict.fromkeys(sockets, b"")
    sent: dict[int, float] = {}
    poller = select.epoll()

    def send(fd: int) -> None:
        data = next(remaining, None)
        if data is not None:
            sent[fd] = time.perf_counter()
            sockets[fd].sendall(data)

    start = time.perf_counter()
    for fd in sockets:
        poller.register(fd, select.EPOLLIN)
        send(fd)
    while sent:
        ready = poller.poll(_ANSWER_TIMEOUT_S)
        if not ready:
            raise RequestFailed(f"{url} has not answered for {_ANSWER_TIMEOUT_S} s")
        for fd, _ in ready:
            part = sockets[fd].recv(_SIZE)
            if not part:
                raise RequestFailed(f"{url} closed the connection after {received[fd]!r}")
            data = received[fd] + part
            body = _body(data)
            if body is None:
                received[fd] = data
                continue
            received[fd] = b""
            latencies.append(time.perf_counter() - sent.pop(fd))
            bodies.append(body)
            send(fd)
    elapsed = time.perf_counter() - start
    poller.close()
    for sock in sockets.values():
        sock.close()
    return Flood(bodies, latencies, elapsed)


def _connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    sock = socket.create_connection((parts.hostname, parts.port), timeout=_ANSWER_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _body(data: bytes) -> bytes | None:
    """The body of an answer, or None while some of it is missing."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    _, _, rest = head.partition(b"content-length:")
    if not rest:
        raise RequestFailed(f"an answer without its length: {head!r}")
    if len(data) < end + 4 + int(rest.partition(b"\r\n")[0]):
        return None
    if data[9:12] != b"200":
        raise RequestFailed(data.decode(errors="replace"))
    return data[end + 4 :]
