"""Submit and status, which services ask for all day, without the framework's way to a route: that takes
longer than the rest of a submit. The handlers are those of the routes (`jobs`), which take everything
else: other parameters and headers, and what is wrong with them. Called by the app's server.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable

from starlette.requests import Request
from starlette.responses import Response

from cortex.operator.http.answers import App, Receive, Scope, Send, answered
from cortex.operator.http.context import Context
from cortex.operator.http.routes.jobs import status_at, submit_to

_WAIT = re.compile(rb"wait=(\d{1,3}(?:\.\d{1,9})?)")


class FastPath:
    """ASGI middleware, right before the framework."""

    def __init__(self, app: App, ctx: Context) -> None:
        self._app = app
        self._ctx = ctx

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._handled(scope, receive)
        if answer is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await answer
        except Exception as error:
            response = answered(error)
        await response(scope, receive, send)

    def _handled(self, scope: Scope, receive: Receive) -> Awaitable[Response] | None:
        parts = scope["path"].removeprefix("/").split("/") if scope["type"] == "http" else [""]
        # `/tasks/<name>` can be an API, and other paths begin with what is no endpoint.
        if "" in parts or parts[0] == "tasks" or self._ctx.catalogue.name_at(parts[0]) is None:
            return None
        if len(parts) == 1 and scope["method"] == "POST":
            for name, _ in scope["headers"]:
                if name == b"idempotency-key":
                    return None
            return submit_to(self._ctx, Request(scope, receive), parts[0])
        if len(parts) == 2 and scope["method"] == "GET":
            query = scope["query_string"]
            asked = _WAIT.fullmatch(query)
            if asked or not query:
                wait_s = float(asked[1]) if asked else 0.0
                return status_at(self._ctx, Request(scope, receive), parts[0], parts[1], wait_s)
        return None
