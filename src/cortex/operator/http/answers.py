"""What every route shares: JSON in and out, limits, foreign origins, and errors as the contract
writes them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route

from cortex.errors import (
    CortexError,
    ForeignOrigin,
    InvalidRequest,
    MethodNotAllowed,
    NoLeader,
    NotFound,
    OutcomeUnknown,
    StorageUnavailable,
    TooLarge,
    UnsupportedMediaType,
)
from cortex.operator.http.bodies import Submitted, not_json, wrong
from cortex.operator.http.body_reader import BodyReader
from cortex.operator.http.coding import CODINGS, Unpacked, coding_of
from cortex.operator.http.hosts import Hosts, foreign
from cortex.projects.pack import MAX_PROJECT_BYTES
from cortex.spec.api import RESERVED_ENDPOINTS
from cortex.spec.job import encode
from cortex.system.oserrors import is_storage

log = structlog.get_logger()

MAX_BODY_BYTES = 10 * 1024 * 1024
# The archive is smaller than the project but for tar's padding of many small files.
MAX_UPLOAD_BYTES = MAX_PROJECT_BYTES + 32 * 1024 * 1024
UPLOAD_PATH = "/-/apis"
_PIECE_CHARS = 256 * 1024
_FORM_TYPE = "application/x-www-form-urlencoded"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Answer(JSONResponse):
    """JSON in ASCII: a lone surrogate that a client sent goes back as it came, as an escape."""

    def __init__(
        self, content: object, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        if headers is not None:
            super().__init__(content, status_code, headers)
            return
        # What the base class comes to, which asks for each header whether it is there.
        self.status_code = status_code
        self.background = None
        self.body = self.render(content)
        self.raw_headers = [
            (b"content-length", b"%d" % len(self.body)),
            (b"content-type", b"application/json"),
        ]

    def render(self, content: object) -> bytes:
        # Bytes are JSON that is written already.
        return content if isinstance(content, bytes) else encode(content).encode()


class LongAnswer(Response):
    """JSON that is written already and is long: it goes out piece by piece, between which others are answered."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = [
            (b"content-length", b"%d" % sum(map(len, pieces))),
            (b"content-type", b"application/json"),
        ]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        for piece in self._pieces:
            for start in range(0, len(piece), _PIECE_CHARS):
                data = piece[start : start + _PIECE_CHARS].encode("ascii")
                await send({"type": "http.response.body", "body": data, "more_body": True})
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})


def written(pieces: Sequence[str]) -> Response:
    """The answer whose JSON is written already, in ASCII, in pieces."""
    if sum(map(len, pieces)) > _PIECE_CHARS:
        return LongAnswer(pieces)
    return Answer("".join(pieces).encode("ascii"))


class Error(BaseModel):
    """Every refusal."""

    kind: str = Field(description="Stable: programs may compare it.")
    message: str = Field(description="What is wrong and what to do.")


class _Endpoint(StringConvertor):
    """A path segment that an API's endpoint can be: none of the operator's own routes begins with it."""

    regex = rf"(?!(?:-|{'|'.join(sorted(RESERVED_ENDPOINTS))})(?:/|$))[^/]+"


class _ApiName(StringConvertor):
    """A path segment that is the name of an API, and no job: their ids begin with a digit."""

    regex = "[a-z][a-z0-9-]*"


register_url_convertor("endpoint", _Endpoint())
register_url_convertor("api_name", _ApiName())


class Gate:
    """ASGI middleware: refuses foreign hosts and origins, and bodies over the limit as they stream in;
    unpacks bodies. It answers HEAD as GET without its body, and takes a path with a slash at its end as
    the path without."""

    def __init__(
        self, app: App, allowed_origins: frozenset[str], hosts: Hosts | None = None
    ) -> None:
        """
        Args:
            hosts: those that requests may name; None is any, as where each brings a token, which no
                other site's page has.
        """
        self._app = app
        self._allowed = allowed_origins
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host")  # every browser sends it
        if self._hosts is not None and host is not None and not self._hosts.takes(host):
            await refuse(foreign(host))(scope, receive, send)
            return
        origin = headers.get(b"origin")
        if origin is not None and self._foreign(origin.decode("latin-1"), host):
            await refuse(
                ForeignOrigin(
                    f"a page from {origin.decode('latin-1')!r} may not call this operator; "
                    "allow it with `cortex serve --allow-origin`"
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
                receive = _body_of(scope["headers"], receive, limit)
            except CortexError as error:
                # RFC 9110, 15.5.16: names what would have been taken.
                is_coding = isinstance(error, UnsupportedMediaType)
                answer = refuse(error, {"Accept-Encoding": CODINGS} if is_coding else None)
                await answer(scope, receive, send)
                return
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # by the server, which ends and has waited long enough
            with suppress(RuntimeError):  # an answer that has begun breaks off
                await refuse(_given_up(method))(scope, receive, send)

    def _foreign(self, origin: str, host: bytes | None) -> bool:
        own = origin.partition("://")[2].encode("latin-1")
        return origin not in self._allowed and own != host


def _body_of(given: Iterable[tuple[bytes, bytes]], receive: Receive, limit: int) -> Receive:
    """A `receive` that unpacks the body and lets no more than `limit` bytes through.

    Raises:
        TooLarge: the Content-Length says so.
        UnsupportedMediaType: the Content-Encoding is not read here.
    """
    headers = dict(given)
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    # The server lets no more through than a Content-Length says.
    packed = receive if b"content-length" in headers else _counted(receive, limit)
    coding = coding_of(b",".join(v for n, v in given if n == b"content-encoding"))
    return _counted(Unpacked(packed, coding), limit) if coding else packed


def _without_body(send: Send) -> Send:
    is_over = False

    async def sending(message: Message) -> None:
        nonlocal is_over
        if is_over:
            return
        await send(message)
        if message["type"] == "http.response.start":
            is_over = True  # the server now says that the client has gone, which ends what streams
            await send({"type": "http.response.body", "body": b""})

    return sending


def _counted(receive: Receive, limit: int) -> Receive:
    taken = 0

    async def counting() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            # While it reads a form, the framework takes any other exception for a form that is broken.
            raise HTTPException(413, _too_large(limit).message)
        return message

    return counting


def _given_up(method: str) -> CortexError:
    if method in {"GET", "HEAD"}:
        return NoLeader("the operator ends. Ask again: another one, or this one when it is back.")
    return OutcomeUnknown(
        "the operator ends in the middle of the change: look whether it was made, before you make it again"
    )


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is over the limit of {limit // 1024**2} MiB")


def refuse(error: CortexError, headers: dict[str, str] | None = None) -> Answer:
    """The answer that an error is."""
    content = {"kind": error.kind, "message": error.message}
    if error.retry_after_s is not None:
        headers = {"Retry-After": str(error.retry_after_s), **(headers or {})}
    return Answer(content, error.http_status, headers=headers)


def answered(error: Exception) -> Answer:
    """The answer that any exception of a request is: what the contract has for it, in this one place."""
    if isinstance(error, OSError) and is_storage(error):
        words = os.strerror(error.errno or 0)
        error = StorageUnavailable(f"the disk takes no writes now: {words}. Try again later.")
    if isinstance(error, CortexError):
        if error.http_status >= 500:
            log.error("request failed", kind=error.kind, error=error.message)
        return refuse(error)
    if isinstance(error, HTTPException):
        words = str(error.detail)
        if error.status_code == 413:
            return refuse(TooLarge(words))
        failed = InvalidRequest(words)
        failed.http_status = error.status_code
        return refuse(failed, dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return refuse(InvalidRequest("; ".join(wrong(e) for e in error.errors())))
    if isinstance(error, ClientDisconnect):
        return refuse(InvalidRequest("the body ended before it was complete"))  # nobody reads it
    log.error("request crashed", exc_info=error)
    # The framework raises it once more, upon which the server closes the connection.
    crashed = CortexError("an error of the operator; its log has the details")
    return refuse(crashed, {"Connection": "close"})


def install_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Let the framework answer exceptions so, and its own as the contract has them.

    Args:
        routes: of the app's routers; the app itself has only those that the framework makes.
    """

    async def known(_: Request, error: Exception) -> Answer:
        return answered(error)

    async def framework(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        # Of the server as a whole (RFC 9110, 9.3.7).
        is_of_all = request.method == "OPTIONS" and request.scope["path"] == "*"
        if error.status_code == 404 and not is_of_all:
            return refuse(NotFound(f"there is nothing at {path}; `cortex get` lists endpoints"))
        if error.status_code in (404, 405):
            methods = _methods_at([*app.routes, *routes], request)
            allow = {"Allow": ", ".join(methods)}
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=allow)
            usable = " or ".join(name for name in methods if name not in {"HEAD", "OPTIONS"})
            return refuse(
                MethodNotAllowed(f"{request.method} is not allowed on {path}; use {usable}"), allow
            )
        return answered(error)

    app.add_exception_handler(HTTPException, framework)  # type: ignore[arg-type]  # it takes its own class
    for kind in (CortexError, RequestValidationError, OSError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, known)


def _methods_at(routes: Sequence[BaseRoute], request: Request) -> list[str]:
    """All that the path takes: the framework tells only of the first route that it is like."""
    like = (
        route
        for route in routes
        if isinstance(route, Route)
        and (request.scope["path"] == "*" or route.matches(request.scope)[0] is not Match.NONE)
    )
    methods = {method for route in like for method in route.methods or ()}
    return sorted(methods | ({"HEAD", "OPTIONS"} if "GET" in methods else {"OPTIONS"}))


async def read_submission(
    request: Request, reader: BodyReader, *, hashed: bool = False
) -> Submitted:
    """The body of a submit, checked.

    Args:
        hashed: whether an Idempotency-Key is to tell it from others.

    Raises:
        UnsupportedMediaType: a Content-Type is given and is not JSON.
        InvalidRequest: the body is not the JSON that the contract allows.
        TooLarge: it is over the limit.
        Busy: it is large, and there is no room to read it now.
    """
    given = request.headers.get("content-type")
    media_type = (given or "application/json").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or media_type.endswith("+json")
    if not is_json and (media_type != _FORM_TYPE or _may_be_of_a_page(request)):
        raise not_json(given)
    form_type = None if is_json else given
    return await reader.read(await _body(request), form_type=form_type, hashed=hashed)


def _may_be_of_a_page(request: Request) -> bool:
    """Whether a browser sent it: its pages can post forms to any site (Fetch, CORS-safelisted)."""
    return any(name == "origin" or name.startswith("sec-fetch-") for name in request.headers)


async def _body(request: Request) -> list[bytes]:
    """As `Request.body`, in the parts that came."""
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts
