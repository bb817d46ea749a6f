"""Decompresses request bodies (RFC 9110, 8.4). Called by the gate."""

from __future__ import annotations

import asyncio
import zlib

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from cortex.errors import UnsupportedMediaType

CODINGS = "gzip, deflate"

_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
_ZLIB_METHOD = 8
_PIECE_BYTES = 256 * 1024


def content_coding(header: bytes) -> str:
    """The coding that a Content-Encoding header names; "" for none.

    Raises:
        UnsupportedMediaType: the coding is not supported, or the header names several.
    """
    given = header.decode("latin-1")
    names = [name.strip().lower().removeprefix("x-") for name in given.split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    if not codings:
        return ""
    if len(codings) == 1 and codings[0] in CODINGS.split(", "):
        return codings[0]
    raise UnsupportedMediaType(
        f"the Content-Encoding {given!r} is not supported; send the body uncompressed, or with "
        f"one of {CODINGS}"
    )


class Decompressed:
    """The `receive` of a request with a compressed body: delivers the decompressed body.

    Memory is bounded whatever the body: a small one can decompress to a thousand times its size.
    """

    def __init__(self, receive: Receive, coding: str) -> None:
        self._receive = receive
        self._coding = coding
        self._compressed = b""
        self._decompressor: zlib._Decompress | None = None
        self._has_more = True
        self._is_complete = False

    async def __call__(self) -> Message:
        """The next message of the request.

        Raises:
            HTTPException: the body does not match its coding, or is incomplete. While it reads a
                form, the framework takes any other exception for a malformed form.
        """
        while not self._is_complete:
            if piece := self._next_piece():
                return {"type": "http.request", "body": piece, "more_body": True}
            if self._compressed:
                await asyncio.sleep(0)  # decompression takes the event loop's time
            elif self._has_more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._compressed = message.get("body", b"")
                self._has_more = message.get("more_body", False)
            elif self._decompressor is not None and not self._decompressor.eof:
                raise self._malformed("it ends in the middle")
            else:
                self._is_complete = True
                return {"type": "http.request", "body": b"", "more_body": False}
        return await self._receive()

    def _next_piece(self) -> bytes:
        if self._decompressor is None or self._decompressor.eof:
            if self._decompressor is not None:
                # A gzip file may have several members, and zeros after the last (RFC 1952,
                # gzip(1)).
                self._compressed = self._compressed.lstrip(b"\0")
            if not self._compressed:
                return b""
            if self._decompressor is not None and self._coding == "deflate":
                raise self._malformed("something follows its end")
            self._decompressor = zlib.decompressobj(self._window_bits())
        try:
            piece = self._decompressor.decompress(self._compressed, _PIECE_BYTES)
        except zlib.error as error:
            raise self._malformed(str(error)) from error
        has_ended = self._decompressor.eof
        self._compressed = (
            self._decompressor.unused_data if has_ended else self._decompressor.unconsumed_tail
        )
        return piece

    def _window_bits(self) -> int:
        if self._coding == "gzip":
            return _GZIP
        # "deflate" is zlib's format (RFC 9110, 8.4.1.2), but some clients send a raw deflate
        # stream.
        return _ZLIB if self._compressed[0] & 0x0F == _ZLIB_METHOD else _RAW

    def _malformed(self, problem: str) -> HTTPException:
        return HTTPException(
            400,
            f"the body is not valid {self._coding}, which its Content-Encoding declares: {problem}",
        )
