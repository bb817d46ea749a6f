"""HTTP on the wire, as uvicorn has it with httptools, and what that leaves open: the refusal of what is no
HTTP is JSON like every other, a header has a limit, an offer to upgrade costs no body, and a client that
is still sending its body can read an early answer. The app's server uses it.
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
from cortex.operator.http.connections import HEADER_S, Connections

MOST_HEADER_BYTES = 64 * 1024
# Many clients read no answer before they have sent all. A socket that is closed with unread data resets
# the connection, and the answer with it. Both bounds are for the rest of a body after its early answer.
MAX_DISCARDED_BYTES = 256 * 1024**2
DISCARD_TIMEOUT_S = 30.0
_PIECE = 16 * 1024  # is read at a time, and a header that goes on is counted so
# A body has to bring so much in a time, and the client to take so much of an answer: less than the slowest
# mobile network has. Who reads a log page by page (`less`) takes longer than who sends.
LEAST_BYTES = 15_000
BODY_S = 30.0
ANSWER_S = 300.0
# Names that offer another protocol (RFC 9110, 7.8; RFC 7540, 3.2): an offer may be ignored.
_AUTHORITY_END = re.compile(rb"[/?#]")
_OFFERS = {b"connection", b"upgrade", b"http2-settings"}


class Protocol(HttpToolsProtocol):
    """One connection."""

    _answered_bytes = 0
    _body_bytes = 0
    _body: Movement | None = None
    _answer: Movement | None = None
    _header_bytes = 0
    _in_header = False
    _discarded_bytes = 0
    _discard_timer: asyncio.TimerHandle | None = None
    _closes_after_discard = False

    def __init__(
        self, config: Config, state: ServerState, loop: AbstractEventLoop, all_of_them: Connections
    ) -> None:
        super().__init__(config, state, {}, loop)
        self._all = all_of_them

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._all.opened(self)

    def data_received(self, data: bytes) -> None:
        """Called by the loop with what has come."""
        self._unset_keepalive_if_required()
        for start in range(0, len(data), _PIECE):
            rest: bytes | None = data[start : start + _PIECE]
            while rest is not None and not self.transport.is_closing():
                rest = self._feed(rest)
            if self._in_header:
                self._header_bytes += len(data[start : start + _PIECE])
                if self._header_bytes > MOST_HEADER_BYTES:
                    self.send_400_response("")

    def _feed(self, data: bytes) -> bytes | None:
        """Read on; what is left to be read by another parser, if this one can read no more."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            return self._without_the_offer() + data[offer.args[0] :]
        except httptools.HttpParserError:
            self.send_400_response("")
        return None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header, self._header_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_header = False
        if self.transport.is_closing():  # by the end of the request before
            return
        hosts = bytes_read = 0
        for name, value in self.headers:
            hosts += name == b"host"
            bytes_read += len(name) + len(value)
        # RFC 9112, 3.2: without one Host it is not clear who is meant.
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise ValueError("not one Host")
        if bytes_read > MOST_HEADER_BYTES or self.parser.get_method() == b"CONNECT":
            raise ValueError("not for this server")
        if not self.url.startswith((b"/", b"*")):
            self._name_the_target()
        # Else the parser takes what follows for another protocol, a body included.
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.cycle.transport = cast(asyncio.Transport, _Outgoing(self, self.cycle))
            self._body = self._answer = None
            self._all.begins(self)

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
            else:  # what was discarded has stopped it
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
                self._all.rests(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answered_early(self.cycle) and not self.transport.is_closing():
            self._discarded_bytes = 0
            self._discard_timer = self.loop.call_later(DISCARD_TIMEOUT_S, self.transport.close)
        elif self.cycle.response_complete:  # else the next request has come already
            self._all.rests(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.closed(self)
        if self._discard_timer is not None:
            self._discard_timer.cancel()
        super().connection_lost(exc)

    def look(self, now: float) -> None:
        """Leave a client whose body does not come, or that does not read its answer."""
        cycle = self.cycle
        if self.is_read_out():
            self._answer = None
            if cycle.response_complete and self._discard_timer is None:
                self._all.rests(self)
        else:
            taken = self._answered_bytes - self._untaken()
            self._answer = self._answer or Movement(now, taken)
            if self._answer.is_too_slow(now, taken, ANSWER_S):
                self.drop()
                return
        is_ours_to_go_on = self.flow.read_paused or cycle.waiting_for_100_continue
        if cycle.response_complete or not cycle.more_body or is_ours_to_go_on:
            self._body = None
            return
        self._body = self._body or Movement(now, self._body_bytes)
        if self._body.is_too_slow(now, self._body_bytes, BODY_S):
            words = f"of the body less than {LEAST_BYTES} bytes came in {BODY_S:g} s"
            self._refuse(_closing(RequestTimeout(f"{words}; send it faster, or compressed")))

    def no_header(self) -> None:
        """Leave a client that has sent no header, or half of one."""
        if self._in_header:
            words = f"no whole header of a request came within {HEADER_S:g} s"
            self._refuse(_closing(RequestTimeout(f"{words}; send it in one piece")))
        else:
            self.transport.close()

    def drop(self) -> None:
        """Leave the client at once."""
        self.transport.abort()

    def is_read_out(self) -> bool:
        """Whether the system has taken all that was answered."""
        return not self.transport.get_write_buffer_size()

    def _untaken(self) -> int:
        """The bytes of answers that are not at the client. The system takes new ones from here in lumps of
        a megabyte, which say little about a slow one."""
        queued = fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def answers(self, data: bytes) -> None:
        """Called with each piece of an answer."""
        self._answered_bytes += len(data)
        self.transport.write(data)

    def close_after(self, cycle: RequestResponseCycle) -> None:
        """Close the connection, once the rest of the request of `cycle` has been read."""
        if self._is_answered_early(cycle):
            self._closes_after_discard = True
            self.transport.write_eof()
        else:
            self.transport.close()

    def _is_answered_early(self, cycle: RequestResponseCycle) -> bool:
        return cycle is self.cycle and cycle.response_complete and cycle.more_body

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read, and close: nobody knows where the next request would begin."""
        self._refuse(_REFUSAL)

    def _refuse(self, answer: bytes) -> None:
        self._in_header = False
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its route learns that the body ends here
            self.cycle.message_event.set()
        is_answered = self._discard_timer is not None or (
            self.cycle is not None
            and self.cycle.response_started
            and not self.cycle.response_complete
        )
        if not is_answered:
            self.transport.write(answer)
        self.transport.close()

    def _name_the_target(self) -> None:
        """RFC 9112, 3.2.2: what a target in absolute form names goes before Host."""
        host = _AUTHORITY_END.split(self.url.partition(b"://")[2], maxsplit=1)[0]
        if b"@" in host:  # RFC 9110, 4.2.4
            raise ValueError("a user in the target")
        # In place, for the scope has this list.
        self.headers[:] = [header for header in self.headers if header[0] != b"host"]
        self.headers.append((b"host", host))

    def _without_the_offer(self) -> bytes:
        """The header that was read, to be read again by a new parser."""
        kept = [(name, value) for name, value in self.headers if name not in _OFFERS]
        if not self.parser.should_keep_alive():
            kept.append((b"connection", b"close"))
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        return b"\r\n".join([*lines, *(b"%s: %s" % header for header in kept), b"", b""])


class _Outgoing:
    """The transport as one exchange uses it: closing it spares the client that is still sending."""

    def __init__(self, protocol: Protocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self.write = protocol.answers
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        """Called by the exchange after an answer that ends the connection, or that broke off."""
        self._protocol.close_after(self._cycle)


@dataclass(slots=True)
class Movement:
    """Since when few bytes have moved, and how many had before."""

    since: float
    before: int

    def is_too_slow(self, now: float, moved: int, within_s: float) -> bool:
        """Whether it took too long for the next few."""
        if moved - self.before >= LEAST_BYTES:
            self.since, self.before = now, moved
        return now - self.since > within_s


def _closing(error: CortexError) -> bytes:
    """The answer that an error is, where there is no exchange that could send it."""
    status = HTTPStatus(error.http_status)
    body = json.dumps({"kind": error.kind, "message": error.message}, separators=(",", ":"))
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return (head + body).encode("ascii")


_REFUSAL = _closing(
    InvalidRequest(
        "this is not a request of HTTP/1.1, or its header is over 64 KiB; send one as RFC 9112 has it"
    )
)
