"""One end of the TCP connection between the operator and the agent of a node: the authentication,
and the frames that follow it.

    agent to operator    32 random bytes
    operator to agent    32 random bytes, and the operator's proof
    agent to operator    the agent's proof
    both                 frames: a head (length, number of the request), and the content

A proof is an HMAC of both sides' random bytes with a key that each process of an agent makes, and
that reaches the operator through Ray. The key never crosses this connection. Nothing is decoded
before the authentication. The frame with the number 0 is the heartbeat.

`connection` has the operator's end, `cortex.ray_node.server` the agent's.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import socket
import struct
from typing import cast

HEAD = struct.Struct("!IQ")
KEY_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_FRAME_BYTES = 256 << 20
HEARTBEAT_INTERVAL_S = 1.0
SILENCE_TIMEOUT_S = 20.0
AUTHENTICATION_TIMEOUT_S = 10.0

_HEARTBEAT = 0
_PROTOCOL = b"cortex agent connection 1: "


class Framed(asyncio.Protocol):
    """One end, on the event loop. The subclasses authenticate, and receive the frames."""

    def __init__(self, key: bytes) -> None:
        self.closed = asyncio.Event()
        self.is_authenticated = False
        self.problem: str | None = None
        """Why the connection was closed."""
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.received = bytearray()
        """What has arrived, and has not been read."""
        self._key = key
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._opened_at = self._received_at = self._ticked_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._outgoing: list[bytes] = []

    @property
    def silent_s(self) -> float:
        """The seconds since anything has arrived. The other end sends something every second."""
        return self._loop.time() - self._received_at

    def authenticate(self) -> None:
        """Read the next step of the authentication from `received`, and take it."""
        raise NotImplementedError

    def on_frame(self, number: int, content: bytes) -> None:
        """A frame has arrived."""
        raise NotImplementedError

    def on_closed(self) -> None:
        """The connection was closed; `problem` says why."""

    def send(self, number: int, content: bytes) -> None:
        """Send a frame. All frames of one turn of the loop leave together."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing += HEAD.pack(len(content), number), content

    def write(self, data: bytes) -> None:
        """Send a step of the authentication."""
        self._transport.write(data)

    def close(self, problem: str) -> None:
        """Close the connection at once. What was not sent is dropped."""
        if self.problem is None:
            self.problem = problem
        self._transport.abort()

    def proof(self, role: bytes, nonce_of_operator: bytes, nonce_of_agent: bytes) -> bytes:
        """The proof that an end knows the key. The roles differ: no end can return a proof that it
        received."""
        content = _PROTOCOL + role + nonce_of_operator + nonce_of_agent
        return hmac.digest(self._key, content, "sha256")

    def take(self, size: int) -> bytes:
        """Remove the first bytes of `received`."""
        with memoryview(self.received) as view:
            taken = bytes(view[:size])
        del self.received[:size]
        return taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another base class
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ticked_at = self._loop.time()
        self._timer = self._loop.call_later(HEARTBEAT_INTERVAL_S, self._tick)

    def data_received(self, data: bytes) -> None:
        self._received_at = self._loop.time()
        self.received += data
        try:
            if not self.is_authenticated:
                self.authenticate()
            if self.is_authenticated:
                self._read_frames()
        except Exception as error:  # whatever the other end sends, this end continues
            self.close(f"the other end sent an invalid message: {error!r}")

    def connection_lost(self, error: Exception | None) -> None:
        if self.problem is None:
            self.problem = "the other end closed it" if error is None else _reason_of(error)
        if self._timer is not None:
            self._timer.cancel()
        self.closed.set()
        self.on_closed()

    def _read_frames(self) -> None:
        while len(self.received) >= HEAD.size and self.problem is None:
            length, number = HEAD.unpack_from(self.received)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are read")
            if len(self.received) < HEAD.size + length:
                return
            _, content = self.take(HEAD.size), self.take(length)
            if number != _HEARTBEAT:
                self.on_frame(number, content)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if not self._transport.is_closing():
            self._transport.write(b"".join(outgoing))

    def _tick(self) -> None:
        now = self._loop.time()
        # While this process was stopped or busy, it has read nothing.
        self._received_at += max(0.0, now - self._ticked_at - HEARTBEAT_INTERVAL_S)
        self._ticked_at = now
        if not self.is_authenticated and now - self._opened_at > AUTHENTICATION_TIMEOUT_S:
            self.close(f"the other end did not authenticate within {AUTHENTICATION_TIMEOUT_S:g} s")
        elif self.silent_s > SILENCE_TIMEOUT_S:
            self.close(f"the other end was silent for {SILENCE_TIMEOUT_S:g} s")
        else:
            if self.is_authenticated:
                self.send(_HEARTBEAT, b"")
            self._timer = self._loop.call_later(HEARTBEAT_INTERVAL_S, self._tick)


def _reason_of(error: Exception) -> str:
    """What an error says, without the number of a system call's error."""
    number = error.errno if isinstance(error, OSError) else None
    return str(error) if number is None else os.strerror(number).lower()
