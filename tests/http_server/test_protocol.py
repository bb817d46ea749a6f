"""The server's side of a connection: how much it reads after an early answer, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from cortex.operator.http import wire
from cortex.operator.server import Server

ANSWER = b"early"


async def early(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"%d" % len(ANSWER))]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": ANSWER, "more_body": True})


@asynccontextmanager
async def connected(
    app: ASGIApp,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of this app."""
    async with serving(app) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def serving(app: ASGIApp, max_connections: int = 100) -> AsyncIterator[tuple[str, int]]:
    """Run a server of this app; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app, listener, max_connections, lambda: None)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    address = listener.getsockname()
    await server.startup()
    try:
        yield address
    finally:
        await server.shutdown()


def run_with_timeout(run: Coroutine[None, None, None]) -> None:
    """Run the coroutine; a connection that is never closed fails the test."""
    asyncio.run(asyncio.wait_for(run, 60))


def head(length: int, connection: str = "keep-alive") -> bytes:
    return (
        f"POST / HTTP/1.1\r\nHost: a\r\nConnection: {connection}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def send_until_closed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, piece: bytes, pause_s: float
) -> int:
    """Send a piece again and again until the server closes the connection; the number of bytes."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
            await asyncio.sleep(pause_s)
    return sent


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_that_trickles_is_disconnected_after_a_time(
    monkeypatch: pytest.MonkeyPatch, connection: str
) -> None:
    monkeypatch.setattr(wire, "DISCARD_TIMEOUT_S", 0.3)

    async def run() -> None:
        async with connected(early) as (reader, writer):
            writer.write(head(1_000_000, connection))
            assert ANSWER in await reader.readuntil(ANSWER)
            await send_until_closed(reader, writer, b"x", 0.02)

    run_with_timeout(run())


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_that_sends_much_is_disconnected_after_a_number_of_bytes(
    monkeypatch: pytest.MonkeyPatch, connection: str
) -> None:
    monkeypatch.setattr(wire, "MAX_DISCARDED_BYTES", 1_000_000)

    async def run() -> None:
        async with connected(early) as (reader, writer):
            writer.write(head(10**12, connection))
            assert ANSWER in await reader.readuntil(ANSWER)
            assert await send_until_closed(reader, writer, bytes(10_000), 0) > 1_000_000

    run_with_timeout(run())


def test_a_kept_connection_serves_further_requests() -> None:
    async def run() -> None:
        async with connected(early) as (reader, writer):
            for _ in range(3):
                writer.write(head(500_000))
                await reader.readuntil(ANSWER)
                writer.write(bytes(500_000))
            writer.write(head(3) + b"abc" + head(3) + b"abc")  # two requests at once
            await reader.readuntil(ANSWER)
            await reader.readuntil(ANSWER)

    run_with_timeout(run())


def test_a_connection_with_close_ends_after_the_body() -> None:
    async def run() -> None:
        async with connected(early) as (reader, writer):
            writer.write(head(500_000, "close"))
            await reader.readuntil(ANSWER)
            # The server sends its last byte before it has the body: the client may read first.
            assert await reader.read() == b""
            writer.write(bytes(500_000) + head(0))
            await writer.drain()
            assert await reader.read() == b""

    run_with_timeout(run())


def test_invalid_http_after_an_early_answer_gets_no_answer() -> None:
    async def run() -> None:
        async with connected(early) as (reader, writer):
            chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(chunked)
            await reader.readuntil(ANSWER)
            writer.write(b"not a length\r\n")
            assert await reader.read() == b""

    run_with_timeout(run())


def test_an_answer_that_breaks_off_closes_the_connection_at_once() -> None:
    async def run() -> None:
        async with connected(broken) as (reader, writer):
            writer.write(head(500_000))
            assert (await reader.read()).endswith(ANSWER + b"\r\n")

    run_with_timeout(run())
