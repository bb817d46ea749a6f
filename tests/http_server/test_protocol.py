"""The server's side of one connection: what is read on after an early answer, and for how long."""

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
async def serving(app: ASGIApp, most: int = 100) -> AsyncIterator[tuple[str, int]]:
    """A server of this app; where it listens."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app, listener, most, lambda: None)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    address = listener.getsockname()
    await server.startup()
    try:
        yield address
    finally:
        await server.shutdown()


def finished(run: Coroutine[None, None, None]) -> None:
    """Run it; a connection that is never closed fails the test."""
    asyncio.run(asyncio.wait_for(run, 60))


def head(length: int, connection: str = "keep-alive") -> bytes:
    return (
        f"POST / HTTP/1.1\r\nHost: a\r\nConnection: {connection}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def sent_until_closed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, piece: bytes, pause_s: float
) -> int:
    """How many bytes were sent when the other side closed."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
            await asyncio.sleep(pause_s)
    return sent


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_that_trickles_is_left_after_a_time(
    monkeypatch: pytest.MonkeyPatch, connection: str
) -> None:
    monkeypatch.setattr(wire, "DISCARD_TIMEOUT_S", 0.3)

    async def run() -> None:
        async with connected(early) as (reader, writer):
            writer.write(head(1_000_000, connection))
            assert ANSWER in await reader.readuntil(ANSWER)
            await sent_until_closed(reader, writer, b"x", 0.02)

    finished(run())


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_that_sends_much_is_left_after_so_many_bytes(
    monkeypatch: pytest.MonkeyPatch, connection: str
) -> None:
    monkeypatch.setattr(wire, "MAX_DISCARDED_BYTES", 1_000_000)

    async def run() -> None:
        async with connected(early) as (reader, writer):
            writer.write(head(10**12, connection))
            assert ANSWER in await reader.readuntil(ANSWER)
            assert await sent_until_closed(reader, writer, bytes(10_000), 0) > 1_000_000

    finished(run())


def test_requests_follow_on_a_connection_that_is_kept() -> None:
    async def run() -> None:
        async with connected(early) as (reader, writer):
            for _ in range(3):
                writer.write(head(500_000))
                await reader.readuntil(ANSWER)
                writer.write(bytes(500_000))
            writer.write(head(3) + b"abc" + head(3) + b"abc")  # and two at once
            await reader.readuntil(ANSWER)
            await reader.readuntil(ANSWER)

    finished(run())


def test_a_connection_that_is_to_be_closed_ends_after_the_body() -> None:
    async def run() -> None:
        async with connected(early) as (reader, writer):
            writer.write(head(500_000, "close"))
            await reader.readuntil(ANSWER)
            # Sent by now: a client that reads to the end need not send the body first.
            assert await reader.read() == b""
            writer.write(bytes(500_000) + head(0))
            await writer.drain()
            assert await reader.read() == b""

    finished(run())


def test_what_is_no_http_after_an_early_answer_is_not_answered() -> None:
    async def run() -> None:
        async with connected(early) as (reader, writer):
            chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(chunked)
            await reader.readuntil(ANSWER)
            writer.write(b"not a length\r\n")
            assert await reader.read() == b""

    finished(run())


def test_an_answer_that_breaks_off_closes_at_once() -> None:
    async def run() -> None:
        async with connected(broken) as (reader, writer):
            writer.write(head(500_000))
            assert (await reader.read()).endswith(ANSWER + b"\r\n")

    finished(run())
