"""Who holds a connection and sends nothing, or reads nothing, is left; who is slow, or waits, is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import Awaitable, Callable, Coroutine

import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from cortex.operator.http import connections, wire
from cortex.operator.server import configure_listener
from http_server.test_protocol import connected, head, serving

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
SOON_S = 0.4
LARGE = bytes(24 * 1024**2)  # more than the system takes for a client that does not read


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it happens at once."""
    monkeypatch.setattr(connections, "_CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", SOON_S)
    monkeypatch.setattr(wire, "BODY_TIMEOUT_S", SOON_S)
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT_S", SOON_S)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body."""
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        if not message["more_body"]:
            break
    await answered(send, b"%d" % length)


async def answered(send: Send, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run(work: Coroutine[None, None, None]) -> None:
    """On the event loop that operators have."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, 100))


async def answer(reader: asyncio.StreamReader) -> bytes:
    """The body of the next one."""
    told = await reader.readuntil(b"\r\n\r\n")
    length = told.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return await reader.readexactly(int(length))


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection ends in any way."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            got += piece
    return got


def timed_out(got: bytes) -> bool:
    told, _, body = got.partition(b"\r\n\r\n")
    return (
        told.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        and b"connection: close" in told
        and json.loads(body)["kind"] == "request.timeout"
    )


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert await rest(reader) == b""


async def half_a_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HALF)
    assert timed_out(await rest(reader))


async def blank_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert await trickled(reader, writer, b"\r\n") == b""


async def header_by_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HALF)
    assert timed_out(await trickled(reader, writer, b"x"))


async def second_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GET + HALF)
    assert await answer(reader) == b"0"
    assert timed_out(await trickled(reader, writer, b"x"))


async def half_a_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(100) + b"x")
    assert timed_out(await rest(reader))


async def body_by_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(1_000_000))
    assert timed_out(await trickled(reader, writer, b"x"))


async def body_by_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    # What is no body is no progress.
    assert timed_out(await trickled(reader, writer, b"1;" + b"x" * 100 + b"\r\ny\r\n"))


async def second_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(1) + b"x" + head(2) + b"x")
    assert await answer(reader) == b"1"
    assert timed_out(await rest(reader))


async def trickled(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, piece: bytes
) -> bytes:
    """What comes back while it is sent again and again."""

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.02)

    sending = asyncio.create_task(send())
    try:
        return await rest(reader)
    finally:
        sending.cancel()


@pytest.mark.parametrize(
    "client",
    [
        silent, half_a_header, blank_lines, header_by_bytes, second_header, half_a_body, body_by_bytes,
        body_by_chunks, second_body,
    ],
    ids=lambda client: client.__name__,
)  # fmt: skip
def test_a_client_that_sends_no_request_is_left(
    client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    async def work() -> None:
        async with connected(echo) as streams:
            await client(*streams)

    run(work())


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_does_not_read_is_left(connection: str, is_streamed: bool) -> None:
    over = asyncio.Event()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not is_streamed:
                await answered(send, LARGE)
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(len(LARGE) // 65536):
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        finally:
            over.set()

    async def work() -> None:
        async with serving(large) as address:
            with stalled(address, head(0, connection)) as client:
                await over.wait()
                loop = asyncio.get_running_loop()
                await asyncio.sleep(3 * SOON_S)
                got = 0
                with contextlib.suppress(ConnectionError):
                    while piece := await loop.sock_recv(client, 1 << 20):
                        got += len(piece)
                assert got < len(LARGE)

    run(work())


@contextlib.contextmanager
def stalled(address: tuple[str, int], request: bytes):  # type: ignore[no-untyped-def]
    with socket.socket() as client:
        client.connect(address)
        client.sendall(request)
        client.setblocking(False)
        yield client


def test_a_slow_client_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MIN_BYTES", 10)
    monkeypatch.setattr(wire, "BODY_TIMEOUT_S", 3.0)
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT_S", 3.0)
    pieces = 70

    async def slow_answer(scope: Scope, receive: Receive, send: Send) -> None:
        await answered(send, LARGE)

    async def sends(address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head(10 * pieces))
        for _ in range(pieces):
            writer.write(bytes(10))
            await asyncio.sleep(0.05)
        assert await answer(reader) == b"%d" % (10 * pieces)
        writer.close()

    async def reads(address: tuple[str, int]) -> None:
        loop, got = asyncio.get_running_loop(), 0
        with stalled(address, head(0, "close")) as client:
            for _ in range(pieces):
                got += len(await loop.sock_recv(client, 65536))
                await asyncio.sleep(0.05)
            while piece := await loop.sock_recv(client, 1 << 20):
                got += len(piece)
        assert got > len(LARGE)

    async def work() -> None:
        async with serving(echo) as first, serving(slow_answer) as second:
            await asyncio.gather(sends(first), reads(second))

    run(work())


async def waited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GET)


async def not_read_yet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(1_000_000))
    writer.write(bytes(1_000_000))


async def asks_before(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(3).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
    writer.write(b"abc")


async def next_one_behind(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GET + HALF)


@pytest.mark.parametrize(
    "client",
    [waited, not_read_yet, asks_before, next_one_behind],
    ids=lambda client: client.__name__,
)
def test_a_client_that_waits_for_us_is_not(
    client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(4 * SOON_S)
        await echo(scope, receive, send)

    async def work() -> None:
        async with connected(late) as (reader, writer):
            await client(reader, writer)
            assert int(await answer(reader)) in (0, 3, 1_000_000)

    run(work())


def test_half_of_the_descriptors_are_for_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in (
        (1, 1), (2, 1), (1024, 512), (20_000, 10_000), (1 << 20, 16_384), (resource.RLIM_INFINITY, 16_384)
    ):  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert connections.max_connections() == most


def test_connections_are_asked_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        configure_listener(listener)
        with socket.create_connection(listener.getsockname()):
            taken, _ = listener.accept()
            with taken:
                for level, option in (
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                ):
                    assert taken.getsockopt(level, option)
                assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
