"""A shortcut to submit and status, the most frequent requests.

The framework's way to a route takes longer than the rest of a submit. The shortcut calls the
handlers of the routes in `routes.jobs`. It takes only plain requests: the routes take all others,
with further parameters and headers or with mistakes in them. Called by the app.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cortex.operator.http.answers import error_answer
from cortex.operator.http.context import Context
from cortex.operator.http.routes.jobs import status_at, submit_to

_WAIT = re.compile(rb"wait=(\d{1,3}(?:\.\d{1,9})?)")


class FastPath:
    """ASGI middleware, directly before the framework."""

    def __init__(self, app: ASGIApp, ctx: Context) -> None:
        self._app = app
        self._ctx = ctx

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handler(scope, receive)
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await handler
        except Exception as error:
            response = error_answer(error)
        await response(scope, receive, send)

    def _handler(self, scope: Scope, receive: Receive) -> Awaitable[Response] | None:
        """The running handler of a submit or status request; None for all other requests."""
        parts = scope["path"].removeprefix("/").split("/") if scope["type"] == "http" else [""]
        # `/tasks/<name>` may name an API. No other path of the operator begins with an endpoint.
        if "" in parts or parts[0] == "tasks" or self._ctx.catalogue.name_at(parts[0]) is None:
            return None
        if len(parts) == 1 and scope["method"] == "POST":
            for name, _ in scope["headers"]:
                if name == b"idempotency-key":
                    return None
            return submit_to(self._ctx, Request(scope, receive), parts[0])
        if len(parts) == 2 and scope["method"] == "GET":
            query = scope["query_string"]
            wait = _WAIT.fullmatch(query)
            if wait or not query:
                wait_s = float(wait[1]) if wait else 0.0
                return status_at(self._ctx, Request(scope, receive), parts[0], parts[1], wait_s)
        return None
