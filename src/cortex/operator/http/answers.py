"""JSON answers, errors as the contract has them, and the body of a submit: what all routes
share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from cortex.errors import (
    CortexError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    StorageUnavailable,
    TooLarge,
)
from cortex.operator.http.bodies import ParsedSubmission, describe_mistake, unsupported_type
from cortex.operator.http.body_reader import BodyReader
from cortex.spec.job import encode
from cortex.system.oserrors import is_storage

log = structlog.get_logger()

_PIECE_CHARS = 256 * 1024
_FORM_TYPE = "application/x-www-form-urlencoded"


class Answer(JSONResponse):
    """JSON in ASCII. A lone surrogate that a client sent is returned unchanged, as an escape."""

    def __init__(
        self, content: object, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        if headers is not None:
            super().__init__(content, status_code, headers)
            return
        # The same result as the base class, without its search for each header in an empty list.
        self.status_code = status_code
        self.background = None
        self.body = self.render(content)
        self.raw_headers = [
            (b"content-length", b"%d" % len(self.body)),
            (b"content-type", b"application/json"),
        ]

    def render(self, content: object) -> bytes:
        # Bytes are JSON already.
        return content if isinstance(content, bytes) else encode(content).encode()


class LongAnswer(Response):
    """A long JSON text, sent in pieces. Between pieces the event loop serves other requests."""

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


def json_answer(pieces: Sequence[str]) -> Response:
    """An answer from pieces of JSON text in ASCII."""
    if sum(map(len, pieces)) > _PIECE_CHARS:
        return LongAnswer(pieces)
    return Answer("".join(pieces).encode("ascii"))


class Error(BaseModel):
    """The body of every error."""

    kind: str = Field(description="Identifies the error. Stable: programs may compare it.")
    message: str = Field(description="What is wrong and what to do, for people. May change.")


def refusal(error: CortexError, headers: dict[str, str] | None = None) -> Answer:
    """The answer for an error of the contract."""
    content = {"kind": error.kind, "message": error.message}
    if error.retry_after_s is not None:
        headers = {"Retry-After": str(error.retry_after_s), **(headers or {})}
    return Answer(content, error.http_status, headers=headers)


def error_answer(error: Exception) -> Answer:
    """The answer for any exception of a request. Only here do exceptions become HTTP."""
    if isinstance(error, OSError) and is_storage(error):
        reason = os.strerror(error.errno or 0)
        error = StorageUnavailable(f"the disk cannot be written right now: {reason}. Retry later.")
    if isinstance(error, CortexError):
        if error.http_status >= 500:
            log.error("request failed", kind=error.kind, error=error.message)
        return refusal(error)
    if isinstance(error, HTTPException):
        detail = str(error.detail)
        if error.status_code == 413:
            return refusal(TooLarge(detail))
        invalid = InvalidRequest(detail)
        invalid.http_status = error.status_code
        return refusal(invalid, dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return refusal(InvalidRequest("; ".join(describe_mistake(e) for e in error.errors())))
    if isinstance(error, ClientDisconnect):  # the client has disconnected and will not read this
        return refusal(InvalidRequest("the body ended before it was complete"))
    log.error("request crashed", exc_info=error)
    # The framework raises the exception again, and the server then closes the connection.
    crashed = CortexError("internal error of the operator; see its log for details")
    return refusal(crashed, {"Connection": "close"})


def install_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Make the framework answer exceptions with `error_answer`, its own 404 and 405 included.

    Args:
        routes: those of the app's routers; `app.routes` has only the routes that the framework
            adds.
    """

    async def any_exception(_: Request, error: Exception) -> Answer:
        return error_answer(error)

    async def framework_exception(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        # `OPTIONS *` asks about the server as a whole (RFC 9110, 9.3.7).
        is_of_server = request.method == "OPTIONS" and request.scope["path"] == "*"
        if error.status_code == 404 and not is_of_server:
            return refusal(NotFound(f"there is nothing at {path}; `cortex get` lists endpoints"))
        if error.status_code in (404, 405):
            methods = _methods_at([*app.routes, *routes], request)
            allow = {"Allow": ", ".join(methods)}
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=allow)
            usable = " or ".join(name for name in methods if name not in {"HEAD", "OPTIONS"})
            return refusal(
                MethodNotAllowed(f"{request.method} is not allowed on {path}; use {usable}"), allow
            )
        return error_answer(error)

    app.add_exception_handler(HTTPException, framework_exception)  # type: ignore[arg-type]  # it takes its own class
    for kind in (CortexError, RequestValidationError, OSError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, any_exception)


def _methods_at(routes: Sequence[BaseRoute], request: Request) -> list[str]:
    """All methods of the request's path. The framework lists only those of the first matching
    route."""
    matching = (
        route
        for route in routes
        if isinstance(route, Route)
        and (request.scope["path"] == "*" or route.matches(request.scope)[0] is not Match.NONE)
    )
    methods = {method for route in matching for method in route.methods or ()}
    return sorted(methods | ({"HEAD", "OPTIONS"} if "GET" in methods else {"OPTIONS"}))


async def read_submission(
    request: Request, reader: BodyReader, *, with_digest: bool = False
) -> ParsedSubmission:
    """Read and check the body of a submit.

    Args:
        with_digest: whether to compute the digest, which an Idempotency-Key needs.

    Raises:
        UnsupportedMediaType: the Content-Type is given and is not JSON.
        InvalidRequest: the body is not the JSON that the contract allows.
        TooLarge: the body is over the limit.
        Busy: the body is large, and the machine has no room to read it right now.
    """
    given = request.headers.get("content-type")
    media_type = (given or "application/json").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or media_type.endswith("+json")
    # `curl -d` sends JSON with the type of a form.
    if not is_json and (media_type != _FORM_TYPE or _may_be_from_a_browser(request)):
        raise unsupported_type(given)
    form_type = None if is_json else given
    return await reader.read(await _body(request), form_type=form_type, with_digest=with_digest)


def _may_be_from_a_browser(request: Request) -> bool:
    """Whether a browser may have sent the request.

    A page can post a form to any site without the site's consent (Fetch, CORS-safelisted).
    """
    return any(name == "origin" or name.startswith("sec-fetch-") for name in request.headers)


async def _body(request: Request) -> list[bytes]:
    """The body as `Request.body` reads it, in its parts."""
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts
