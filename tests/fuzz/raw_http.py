"""Sends requests as bytes on a socket, which no client library would send. The standard library's
parser of responses decides whether an answer is HTTP."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import struct
from dataclasses import dataclass

WAIT_TIMEOUT_S = 60


@dataclass(frozen=True)
class Case:
    """The bytes to send, and how to send them."""

    sent: bytes
    method: str = "GET"
    """The framing of the answer depends on it."""
    fresh: bool = False
    """Whether to use a new connection."""
    then: str = "read"
    """`read` the answers, `shut` our side first, `leave` without reading, or `reset`."""
    may_close: bool = False
    """Whether the operator may close without an answer: the HTTP is invalid or incomplete."""
    answers: int = 1


@dataclass(frozen=True)
class Answer:
    """One response. Status 0: the connection ended without one, or the response was no HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes
    broken: str = ""


class _Reader(io.BufferedReader):
    """Stays open for the next answer, although HTTPResponse closes its file."""

    def close(self) -> None:
        pass

    def makefile(self, _mode: str) -> _Reader:
        return self


class Connection:
    """A connection to an operator, opened again whenever it has ended."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._used = False

    @property
    def _is_open(self) -> bool:
        return self._socket is not None

    def exchange(self, case: Case) -> list[Answer]:
        """Send a case, and return the answers."""
        if case.fresh:
            self.close()
        was_used = self._socket is not None
        found = self._exchange(case)
        if was_used and found and not found[0].status and found[0].broken == "closed":
            found = self._exchange(case)  # the operator had closed the idle connection
        if case.fresh:
            self.close()
        return found

    def close(self) -> None:
        if self._socket is not None:
            self._reader.detach().close()
            self._socket.close()
            self._socket = None

    def _exchange(self, case: Case) -> list[Answer]:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, WAIT_TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._reader = _Reader(socket.SocketIO(self._socket, "r"))
        # The operator may answer and close before it has read the whole request.
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(case.sent)
        if case.then == "shut":
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        if case.then == "reset":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if case.then in {"leave", "reset"}:
            self.close()
            return []
        found = []
        for _ in range(case.answers):
            answer = self._read(case.method)
            found.append(answer)
            if not answer.status:
                self.close()
            if not self._is_open:
                break
        return found

    def _read(self, method: str) -> Answer:
        response = http.client.HTTPResponse(self._reader, method=method)  # type: ignore[arg-type]  # it only calls makefile
        try:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            body = response.read()
            ended = response.will_close
        except (http.client.RemoteDisconnected, ConnectionError):
            return Answer(0, {}, b"", "closed")
        except (http.client.HTTPException, TimeoutError, ValueError) as error:
            return Answer(0, {}, b"", f"{type(error).__name__}: {error}")
        if ended:
            self.close()
        return Answer(response.status, headers, body)


def request(
    method: str, target: str | bytes, headers: list[tuple[bytes, bytes]], body: bytes | None = None
) -> bytes:
    """The bytes of a request, unchecked. Content-Length is added for a body."""
    sent = target if isinstance(target, bytes) else target.encode("utf-8", "replace")
    lines = [method.encode("latin-1", "replace") + b" " + sent + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in headers]
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")
