"""HTTP on the wire, as uvicorn has it with httptools, and what that leaves open: the refusal of what is no
HTTP is JSON like every other, a header has a limit, an offer to upgrade costs no body, and a client that
is still sending its body can read an early answer. The app's server uses it.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cortex.errors import InvalidRequest

MOST_HEADER_BYTES = 64 * 1024
# Many clients read no answer before they have sent all. A socket that is closed with unread data resets
# the connection, and the answer with it. Both bounds are for the rest of a body after its early answer.
MAX_DISCARDED_BYTES = 256 * 1024**2
DISCARD_TIMEOUT_S = 30.0
_PIECE = 16 * 1024  # is read at a time, and a header that goes on is counted so
# Names that offer another protocol (RFC 9110, 7.8; RFC 7540, 3.2): an offer may be ignored.
_AUTHORITY_END = re.compile(rb"[/?#]")
_OFFERS = {b"connection", b"upgrade", b"http2-settings"}


class Protocol(HttpToolsProtocol):
    """One connection."""

    _header_bytes = 0
    _in_header = False
    _discarded_bytes = 0
    _discard_timer: asyncio.TimerHandle | None = None
    _closes_after_discard = False

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

    def on_body(self, body: bytes) -> None:
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

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answered_early(self.cycle) and not self.transport.is_closing():
            self._discarded_bytes = 0
            self._discard_timer = self.loop.call_later(DISCARD_TIMEOUT_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._discard_timer is not None:
            self._discard_timer.cancel()
        super().connection_lost(exc)

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
            self.transport.write(_REFUSAL)
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
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        """Called by the exchange after an answer that ends the connection, or that broke off."""
        self._protocol.close_after(self._cycle)


def _refusal() -> bytes:
    error = InvalidRequest(
        "this is not a request of HTTP/1.1, or its header is over 64 KiB; send one as RFC 9112 has it"
    )
    body = json.dumps({"kind": error.kind, "message": error.message}, separators=(",", ":"))
    head = (
        f"HTTP/1.1 {error.http_status} Bad Request\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return (head + body).encode("ascii")


_REFUSAL = _refusal()
