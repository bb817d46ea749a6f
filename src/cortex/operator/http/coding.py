"""Request bodies that a client compressed (RFC 9110, 8.4). Called by the gate in front of all routes."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from cortex.errors import UnsupportedMediaType

if TYPE_CHECKING:
    from cortex.operator.http.answers import Message, Receive

CODINGS = "gzip, deflate"

_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
_ZLIB_METHOD = 8
_PIECE_BYTES = 256 * 1024


def coding_of(header: bytes) -> str:
    """The coding that a Content-Encoding header names, "" for none.

    Raises:
        UnsupportedMediaType: it is not read here, or there are several.
    """
    given = header.decode("latin-1")
    names = [name.strip().lower().removeprefix("x-") for name in given.split(",")]
    named = [name for name in names if name not in ("", "identity")]
    if not named:
        return ""
    if len(named) == 1 and named[0] in CODINGS.split(", "):
        return named[0]
    raise UnsupportedMediaType(
        f"the Content-Encoding {given!r} is not read here; send the body as it is, or with one of "
        f"{CODINGS}"
    )


class Unpacked:
    """The `receive` of a request whose body is compressed: passes on what the body unpacks to.

    Its memory does not depend on the body: a small one can unpack to a thousand times its size.
    """

    def __init__(self, receive: Receive, coding: str) -> None:
        self._receive = receive
        self._coding = coding
        self._packed = b""
        self._unpacker: zlib._Decompress | None = None
        self._has_more = True
        self._is_over = False

    async def __call__(self) -> Message:
        """The next message of the request.

        Raises:
            HTTPException: the body is not what its coding says, or ends in the middle. While it reads
                a form, the framework takes any other exception for a form that is broken.
        """
        while not self._is_over:
            if piece := self._next_piece():
                return {"type": "http.request", "body": piece, "more_body": True}
            if self._packed:
                await asyncio.sleep(0)  # unpacking takes the loop's time
            elif self._has_more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._packed = message.get("body", b"")
                self._has_more = message.get("more_body", False)
            elif self._unpacker is not None and not self._unpacker.eof:
                raise self._broken("it ends in the middle")
            else:
                self._is_over = True
                return {"type": "http.request", "body": b"", "more_body": False}
        return await self._receive()

    def _next_piece(self) -> bytes:
        if self._unpacker is None or self._unpacker.eof:
            if self._unpacker is not None:
                # A gzip file may have several members, and zeros after the last (RFC 1952, gzip(1)).
                self._packed = self._packed.lstrip(b"\0")
            if not self._packed:
                return b""
            if self._unpacker is not None and self._coding == "deflate":
                raise self._broken("something follows its end")
            self._unpacker = zlib.decompressobj(self._window())
        try:
            piece = self._unpacker.decompress(self._packed, _PIECE_BYTES)
        except zlib.error as error:
            raise self._broken(str(error)) from error
        ended = self._unpacker.eof
        self._packed = self._unpacker.unused_data if ended else self._unpacker.unconsumed_tail
        return piece

    def _window(self) -> int:
        if self._coding == "gzip":
            return _GZIP
        # "deflate" is zlib's format (RFC 9110, 8.4.1.2); some clients send the bare stream.
        return _ZLIB if self._packed[0] & 0x0F == _ZLIB_METHOD else _RAW

    def _broken(self, why: str) -> HTTPException:
        return HTTPException(
            400, f"the body is not {self._coding}, as its Content-Encoding says: {why}"
        )
