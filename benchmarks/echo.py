"""The bare limit of a request: `cortex serve` with its own server and event loop, and an
application that returns its input in place of the operator's. FastAPI answers `/`; `/bare` is the
least code that the server can call.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import cortex.operator.app
from cortex.cli.serve import serve

api = FastAPI()


@api.post("/")
async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/json")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] != "/bare":
        await api(scope, receive, send)
        return
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message.get("more_body"):
            break
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def open_operator(*_: object) -> AsyncIterator[ASGIApp]:
    yield app


if __name__ == "__main__":
    cortex.operator.app.open_operator = open_operator
    serve(port=0, data_dir=Path(sys.argv[1]))
