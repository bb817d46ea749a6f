"""HTTP/1.1 on a connection: uvicorn's protocol with httptools, and what that lacks.

- What is not HTTP is refused in JSON, as every other error.
- The size of a header is limited.
- A request that offers another protocol (Upgrade) keeps its body.
- A client that is still sending its body can read an early answer.
- Stalled clients are disconnected.

The operator's server makes one `HttpProtocol` for each connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import re
import sys
import termios
from asyncio import AbstractEventLoop
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cortex.errors import CortexError, InvalidRequest, RequestTimeout
from cortex.operator.http.connections import HEADER_TIMEOUT_S, Connections

MAX_HEADER_BYTES = 64 * 1024
# Many clients read no answer before they have sent the whole body. Closing a socket with unread
# data resets the connection, and the client loses the answer. After an early answer the server
# therefore reads and discards the rest of the body, within these two bounds.
MAX_DISCARDED_BYTES = 256 * 1024**2
DISCARD_TIMEOUT_S = 30.0
_CHUNK_BYTES = 16 * 1024  # read at a time; the size of an incomplete header is counted in these
# Within each timeout, a client has to send (a body) or take (an answer) this many bytes: less than
# the slowest mobile network transfers. A reader who pages through a log (`less`) needs longer than
# a sender.
MIN_BYTES = 15_000
BODY_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 300.0
_AUTHORITY_END = re.compile(rb"[/?#]")
# Headers that offer another protocol, which a server may ignore (RFC 9110, 7.8; RFC 7540, 3.2).
_UPGRADE_HEADERS = {b"connection", b"upgrade", b"http2-settings"}


class HttpProtocol(HttpToolsProtocol):
    """One connection. uvicorn and the event loop call it."""

    _answered_bytes = 0
    _body_bytes = 0
    _body_progress: Progress | None = None
    _answer_progress: Progress | None = None
    _header_bytes = 0
    _in_header = False
    _discarded_bytes = 0
    _discard_timer: asyncio.TimerHandle | None = None
    _closes_after_discard = False

    def __init__(
        self, config: Config, state: ServerState, loop: AbstractEventLoop, connections: Connections
    ) -> None:
        super().__init__(config, state, {}, loop)
        self._connections = connections  # not `connections`, in which uvicorn counts its own

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._connections.opened(self)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with received bytes."""
        self._unset_keepalive_if_required()
        for start in range(0, len(data), _CHUNK_BYTES):
            rest: bytes | None = data[start : start + _CHUNK_BYTES]
            while rest is not None and not self.transport.is_closing():
                rest = self._feed(rest)
            if self._in_header:
                self._header_bytes += len(data[start : start + _CHUNK_BYTES])
                if self._header_bytes > MAX_HEADER_BYTES:
                    self.send_400_response("")

    def _feed(self, data: bytes) -> bytes | None:
        """Parse bytes.

        Returns:
            The bytes that a new parser has to read, because this one stopped at an Upgrade; else
            None.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            return self._header_without_upgrade() + data[offer.args[0] :]
        except httptools.HttpParserError:
            self.send_400_response("")
        return None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header, self._header_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_header = False
        if self.transport.is_closing():  # the previous request closed the connection
            return
        hosts = bytes_read = 0
        for name, value in self.headers:
            hosts += name == b"host"
            bytes_read += len(name) + len(value)
        # RFC 9112, 3.2: a request of HTTP/1.1 has exactly one Host.
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise ValueError("not exactly one Host")
        if bytes_read > MAX_HEADER_BYTES or self.parser.get_method() == b"CONNECT":
            raise ValueError("the header is too large, or the method is CONNECT")
        if not self.url.startswith((b"/", b"*")):
            self._set_host_from_target()
        # At an upgrade, the parser takes the bytes that follow for the other protocol, even a body.
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.cycle.transport = cast(asyncio.Transport, _AnswerTransport(self, self.cycle))
            self._body_progress = self._answer_progress = None
            self._connections.request_started(self)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self.cycle is not None:
            super().on_body(body)
        if self._discard_timer is not None:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        if self.cycle is None or self.parser.should_upgrade():
            return
        super().on_message_complete()
        if self._discard_timer is not None:
            self._discard_timer.cancel()
            self._discard_timer = None
            if self._closes_after_discard:
                self.transport.close()
            else:  # the discarded bytes stopped uvicorn's keep-alive timer
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
                self._connections.request_finished(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answered_early(self.cycle) and not self.transport.is_closing():
            self._discarded_bytes = 0
            self._discard_timer = self.loop.call_later(DISCARD_TIMEOUT_S, self.transport.close)
        elif self.cycle.response_complete:  # else the next request has arrived already
            self._connections.request_finished(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        if self._discard_timer is not None:
            self._discard_timer.cancel()
        super().connection_lost(exc)

    def check_progress(self, now: float) -> None:
        """Disconnect a client that sends its body, or reads its answer, too slowly."""
        cycle = self.cycle
        if self.is_flushed():
            self._answer_progress = None
            if cycle.response_complete and self._discard_timer is None:
                self._connections.request_finished(self)
        else:
            taken = self._answered_bytes - self._unacknowledged_bytes()
            self._answer_progress = self._answer_progress or Progress(now, taken)
            if self._answer_progress.is_too_slow(now, taken, ANSWER_TIMEOUT_S):
                self.abort()
                return
        waits_for_server = self.flow.read_paused or cycle.waiting_for_100_continue
        if cycle.response_complete or not cycle.more_body or waits_for_server:
            self._body_progress = None
            return
        self._body_progress = self._body_progress or Progress(now, self._body_bytes)
        if self._body_progress.is_too_slow(now, self._body_bytes, BODY_TIMEOUT_S):
            problem = f"less than {MIN_BYTES} bytes of the body arrived in {BODY_TIMEOUT_S:g} s"
            self._refuse(
                _closing_answer(RequestTimeout(f"{problem}; send it faster, or compressed"))
            )

    def header_timed_out(self) -> None:
        """Disconnect a client that has sent no header, or an incomplete one."""
        if self._in_header:
            problem = f"the header of the request was not complete within {HEADER_TIMEOUT_S:g} s"
            self._refuse(_closing_answer(RequestTimeout(f"{problem}; send it in one piece")))
        else:
            self.transport.close()

    def abort(self) -> None:
        """Disconnect the client at once."""
        self.transport.abort()

    def is_flushed(self) -> bool:
        """Whether the kernel has taken all answers."""
        return not self.transport.get_write_buffer_size()

    def _unacknowledged_bytes(self) -> int:
        """The bytes of answers that the client has not acknowledged.

        The kernel takes bytes from the write buffer by the megabyte, so that the buffer alone says
        little about a slow client.
        """
        queued = fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def write_answer(self, data: bytes) -> None:
        """Write a piece of an answer."""
        self._answered_bytes += len(data)
        self.transport.write(data)

    def close_after(self, cycle: RequestResponseCycle) -> None:
        """Close the connection, after the rest of a body whose request was answered early."""
        if self._is_answered_early(cycle):
            self._closes_after_discard = True
            self.transport.write_eof()
        else:
            self.transport.close()

    def _is_answered_early(self, cycle: RequestResponseCycle) -> bool:
        return cycle is self.cycle and cycle.response_complete and cycle.more_body

    def send_400_response(self, msg: str) -> None:
        """Refuse unreadable bytes, and close: it is unknown where the next request would begin."""
        self._refuse(_NOT_HTTP)

    def _refuse(self, answer: bytes) -> None:
        self._in_header = False
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the route's `receive` reports that the body ends here
            self.cycle.message_event.set()
        is_answered = self._discard_timer is not None or (
            self.cycle is not None
            and self.cycle.response_started
            and not self.cycle.response_complete
        )
        if not is_answered:
            self.transport.write(answer)
        self.transport.close()

    def _set_host_from_target(self) -> None:
        """Replace Host by the host of a target in absolute form (RFC 9112, 3.2.2)."""
        host = _AUTHORITY_END.split(self.url.partition(b"://")[2], maxsplit=1)[0]
        if b"@" in host:  # RFC 9110, 4.2.4
            raise ValueError("the target names a user")
        # In place, because the scope refers to this list.
        self.headers[:] = [header for header in self.headers if header[0] != b"host"]
        self.headers.append((b"host", host))

    def _header_without_upgrade(self) -> bytes:
        """The header that was read, for a new parser, without the offer of another protocol."""
        headers = [(name, value) for name, value in self.headers if name not in _UPGRADE_HEADERS]
        if not self.parser.should_keep_alive():
            headers.append((b"connection", b"close"))
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        return b"\r\n".join([*lines, *(b"%s: %s" % header for header in headers), b"", b""])


class _AnswerTransport:
    """The transport of one request and its answer.

    Its `close` lets a client that is still sending its body read the answer first.
    """

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self.write = protocol.write_answer
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        """Called by uvicorn after an answer that ends the connection, or that broke off."""
        self._protocol.close_after(self._cycle)


@dataclass(slots=True)
class Progress:
    """When a transfer last moved `MIN_BYTES`.

    Attributes:
        since: the time when that count began.
        moved_before: the bytes moved until then.
    """

    since: float
    moved_before: int

    def is_too_slow(self, now: float, moved: int, timeout_s: float) -> bool:
        """Whether the next `MIN_BYTES` take longer than the timeout."""
        if moved - self.moved_before >= MIN_BYTES:
            self.since, self.moved_before = now, moved
        return now - self.since > timeout_s


def _closing_answer(error: CortexError) -> bytes:
    """The answer for an error that no application can send, after which the connection closes."""
    status = HTTPStatus(error.http_status)
    body = json.dumps({"kind": error.kind, "message": error.message}, separators=(",", ":"))
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return (head + body).encode("ascii")


_NOT_HTTP = _closing_answer(
    InvalidRequest(
        "this is not a valid request of HTTP/1.1 (RFC 9112), or its header is over 64 KiB; check "
        "the client, or send fewer and shorter headers"
    )
)
