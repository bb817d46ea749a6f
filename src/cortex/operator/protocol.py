"""HTTP on the wire, as uvicorn has it with httptools, and what that leaves open: the refusal of what is no
HTTP is JSON like every other, a header has a limit, and an offer to upgrade costs no body. The app's
server uses it.
"""

from __future__ import annotations

import json

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cortex.errors import InvalidRequest

MOST_HEADER_BYTES = 64 * 1024
_PIECE = 16 * 1024  # is read at a time, and a header that goes on is counted so
# Names that offer another protocol (RFC 9110, 7.8; RFC 7540, 3.2): an offer may be ignored.
_OFFERS = {b"connection", b"upgrade", b"http2-settings"}


class Protocol(HttpToolsProtocol):
    """One connection."""

    _header_bytes = 0
    _in_header = False

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
        hosts = bytes_read = 0
        for name, value in self.headers:
            hosts += name == b"host"
            bytes_read += len(name) + len(value)
        # RFC 9112, 3.2: without one Host it is not clear who is meant.
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise ValueError("not one Host")
        if bytes_read > MOST_HEADER_BYTES or self.parser.get_method() == b"CONNECT":
            raise ValueError("not for this server")
        # Else the parser takes what follows for another protocol, a body included.
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is not None and not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read, and close: nobody knows where the next request would begin."""
        self._in_header = False
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its route learns that the body ends here
            self.cycle.message_event.set()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_REFUSAL)
        self.transport.close()

    def _without_the_offer(self) -> bytes:
        """The header that was read, to be read again by a new parser."""
        kept = [(name, value) for name, value in self.headers if name not in _OFFERS]
        if not self.parser.should_keep_alive():
            kept.append((b"connection", b"close"))
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        return b"\r\n".join([*lines, *(b"%s: %s" % header for header in kept), b"", b""])


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
