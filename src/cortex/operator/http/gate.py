"""The first check of every request, before authentication and the routes: host, origin and size.

The gate refuses foreign hosts and origins, limits and decompresses bodies, answers HEAD as GET
without its body, and ignores a slash at the end of a path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cortex.errors import (
    CortexError,
    ForeignOrigin,
    NoLeader,
    OutcomeUnknown,
    TooLarge,
    UnsupportedMediaType,
)
from cortex.operator.http.answers import refusal
from cortex.operator.http.decompression import CODINGS, Decompressed, content_coding
from cortex.operator.http.host_check import AllowedHosts, foreign_host
from cortex.projects.pack import MAX_PROJECT_BYTES

UPLOAD_PATH = "/-/apis"
MAX_BODY_BYTES = 10 * 1024 * 1024
# An archive is smaller than its project, except for tar's padding, which adds up with many small
# files.
MAX_UPLOAD_BYTES = MAX_PROJECT_BYTES + 32 * 1024 * 1024


class Gate:
    """ASGI middleware, outermost."""

    def __init__(
        self, app: ASGIApp, allowed_origins: frozenset[str], hosts: AllowedHosts | None = None
    ) -> None:
        """
        Args:
            hosts: the hosts that requests may name; None allows all. An operator that requires
                tokens allows all, because a page of another site has no token.
        """
        self._app = app
        self._allowed_origins = allowed_origins
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host")  # every browser sends it
        if self._hosts is not None and host is not None and not self._hosts.allows(host):
            await refusal(foreign_host(host))(scope, receive, send)
            return
        origin = headers.get(b"origin")
        if origin is not None and self._is_foreign(origin.decode("latin-1"), host):
            await refusal(
                ForeignOrigin(
                    f"a page of {origin.decode('latin-1')!r} may not call this operator; "
                    "allow the origin with `cortex serve --allow-origin`"
                )
            )(scope, receive, send)
            return
        path = scope["path"]
        if len(path) > 1 and path.endswith("/"):
            scope["path"] = path[:-1]
        method = scope["method"]
        if method == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        elif method != "GET":
            limit = MAX_UPLOAD_BYTES if scope["path"] == UPLOAD_PATH else MAX_BODY_BYTES
            try:
                receive = _limited_body(scope["headers"], receive, limit)
            except CortexError as error:
                # RFC 9110, 15.5.16: the answer lists the codings that the server accepts.
                is_coding = isinstance(error, UnsupportedMediaType)
                answer = refusal(error, {"Accept-Encoding": CODINGS} if is_coding else None)
                await answer(scope, receive, send)
                return
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # the server shuts down, and its grace period has passed
            with suppress(RuntimeError):  # an answer that has begun breaks off
                await refusal(_shutdown_error(method))(scope, receive, send)

    def _is_foreign(self, origin: str, host: bytes | None) -> bool:
        named = origin.partition("://")[2].encode("latin-1")
        return origin not in self._allowed_origins and named != host


def _limited_body(headers: Sequence[tuple[bytes, bytes]], receive: Receive, limit: int) -> Receive:
    """Make a `receive` that decompresses the body and fails beyond `limit` bytes.

    Raises:
        TooLarge: the Content-Length exceeds the limit.
        UnsupportedMediaType: the Content-Encoding is not supported.
    """
    by_name = dict(headers)
    declared = by_name.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    # The server delivers no more bytes than a Content-Length declares.
    raw = receive if b"content-length" in by_name else _counted(receive, limit)
    coding = content_coding(b",".join(v for n, v in headers if n == b"content-encoding"))
    return _counted(Decompressed(raw, coding), limit) if coding else raw


def _counted(receive: Receive, limit: int) -> Receive:
    """Make a `receive` that fails beyond `limit` bytes."""
    received = 0

    async def count() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            # While it reads a form, the framework takes any other exception for a malformed form.
            raise HTTPException(413, _too_large(limit).message)
        return message

    return count


def _without_body(send: Send) -> Send:
    """Make a `send` that drops the body of an answer."""
    is_complete = False

    async def send_header(message: Message) -> None:
        nonlocal is_complete
        if is_complete:
            return
        await send(message)
        if message["type"] == "http.response.start":
            # After the empty body, `receive` reports a disconnect, which ends streaming routes.
            is_complete = True
            await send({"type": "http.response.body", "body": b""})

    return send_header


def _shutdown_error(method: str) -> CortexError:
    if method in {"GET", "HEAD"}:
        return NoLeader("the operator is shutting down; retry")
    return OutcomeUnknown(
        "the operator is shutting down; the change may or may not have been stored: check before "
        "repeating it"
    )


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is over the limit of {limit // 1024**2} MiB")
