"""What every route shares: JSON in and out, limits, foreign origins, and errors as the contract
writes them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, NoReturn

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match, Route

from cortex.errors import (
    CortexError,
    ForeignOrigin,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    TooLarge,
    UnsupportedMediaType,
)
from cortex.projects.pack import MAX_PROJECT_BYTES
from cortex.spec.job import Submission

log = structlog.get_logger()

MAX_BODY_BYTES = 10 * 1024 * 1024
# The archive is smaller than the project but for tar's padding of many small files.
MAX_UPLOAD_BYTES = MAX_PROJECT_BYTES + 32 * 1024 * 1024
UPLOAD_PATH = "/-/apis"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Answer(JSONResponse):
    """JSON in ASCII: a lone surrogate that a client sent goes back as it came, as an escape."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


class Gate:
    """ASGI middleware: refuses foreign origins, and bodies over the limit as they stream in."""

    def __init__(self, app: App, allowed_origins: frozenset[str]) -> None:
        self._app = app
        self._allowed = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and self._foreign(origin.decode("latin-1"), headers.get(b"host")):
            await refuse(
                ForeignOrigin(
                    f"a page from {origin.decode('latin-1')!r} may not call this operator; "
                    "allow it with `cortex serve --allow-origin`"
                )
            )(scope, receive, send)
            return
        limit = MAX_UPLOAD_BYTES if scope["path"] == UPLOAD_PATH else MAX_BODY_BYTES
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await refuse(_too_large(limit))(scope, receive, send)
            return
        await self._app(scope, _counted(receive, limit), send)

    def _foreign(self, origin: str, host: bytes | None) -> bool:
        own = origin.partition("://")[2].encode("latin-1")
        return origin not in self._allowed and own != host


def _counted(receive: Receive, limit: int) -> Receive:
    taken = 0

    async def counting() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            raise _too_large(limit)
        return message

    return counting


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is over the limit of {limit // 1024**2} MiB")


def refuse(error: CortexError, headers: dict[str, str] | None = None) -> Answer:
    """The answer that an error is."""
    content = {"kind": error.kind, "message": error.message}
    return Answer(content, error.http_status, headers=headers)


def install_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Turn every exception into the contract's errors, in this one place."""

    async def known(_: Request, error: CortexError) -> Answer:
        if error.http_status >= 500:
            log.error("request failed", kind=error.kind, error=error.message)
        return refuse(error)

    async def framework(request: Request, error: HTTPException) -> Answer:
        headers = dict(error.headers or {})
        path = request.url.path
        if error.status_code == 404:
            return refuse(NotFound(f"there is nothing at {path}; `cortex get` lists endpoints"))
        if error.status_code == 405:
            allowed = headers["Allow"] = ", ".join(_methods_at(routes, request))
            return refuse(
                MethodNotAllowed(f"{request.method} is not for {path}; {allowed} is"), headers
            )
        failed = InvalidRequest(str(error.detail))
        failed.http_status = error.status_code
        return refuse(failed, headers)

    async def invalid(_: Request, error: RequestValidationError) -> Answer:
        return refuse(InvalidRequest("; ".join(_wrong(e) for e in error.errors())))

    async def unknown(_: Request, error: Exception) -> Answer:
        log.error("request crashed", exc_info=error)
        return refuse(CortexError("an error of the operator; its log has the details"))

    app.add_exception_handler(CortexError, known)  # type: ignore[arg-type]  # each takes its own class
    app.add_exception_handler(HTTPException, framework)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, unknown)


def _methods_at(routes: Sequence[BaseRoute], request: Request) -> list[str]:
    """All that the path takes: the framework tells only of the first route that it is like."""
    like = (
        route
        for route in routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    )
    return sorted({method for route in like for method in route.methods or ()})


def _wrong(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("query", "path", "body"))
    found = error.get("input")
    shown = json.dumps(found, default=str)
    return f"{where or 'the body'}: {error['msg']}; found {shown[:100]}"


async def read_submission(request: Request) -> tuple[Submission, bytes]:
    """The body of a submit, checked, and its bytes.

    Raises:
        UnsupportedMediaType: a Content-Type is given and is not JSON.
        InvalidRequest: the body is not the JSON that the contract allows.
        TooLarge: it is over the limit.
    """
    given = request.headers.get("content-type")
    media_type = (given or "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(
            f"the Content-Type {given!r} is not JSON; send the header 'Content-Type: application/json'"
        )
    body = await request.body()
    if not body.strip():
        raise InvalidRequest("the body is empty; send {} to submit a job with the API's defaults")
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise InvalidRequest("the body is not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(
            f"the body has to be a JSON object such as {{}}; found {json.dumps(content)[:100]}"
        )
    try:
        return Submission.model_validate(content), body
    except ValidationError as error:
        allowed = ", ".join(Submission.model_fields)
        mistakes = "; ".join(_wrong(e) for e in error.errors())
        raise InvalidRequest(f"{mistakes} (fields: {allowed})") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
