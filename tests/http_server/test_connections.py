"""The server disconnects a client that sends or reads nothing, and serves a client that is slow or
waits for its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator

import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from cortex.operator.http import connections, wire
from cortex.operator.server import configure_listener
from http_server.test_protocol import connected, head, serving

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
TIMEOUT_S = 0.4
LARGE = bytes(24 * 1024**2)  # more than the kernel buffers for a client that does not read


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every timeout passes within the test."""
    monkeypatch.setattr(connections, "CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(wire, "BODY_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT_S", TIMEOUT_S)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body."""
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        if not message["more_body"]:
            break
    await send_answer(send, b"%d" % length)


async def send_answer(send: Send, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run_on_uvloop(work: Coroutine[None, None, None]) -> None:
    """Run the work on the event loop that operators use."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, 100))


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """The body of the next answer."""
    header = await reader.readuntil(b"\r\n\r\n")
    length = header.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return await reader.readexactly(int(length))


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """All bytes until the connection ends, by an error or not."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            received += piece
    return received


def is_timeout_answer(received: bytes) -> bool:
    header, _, body = received.partition(b"\r\n\r\n")
    return (
        header.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        and b"connection: close" in header
        and json.loads(body)["kind"] == "request.timeout"
    )


async def sends_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert await read_to_end(reader) == b""


async def sends_half_a_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HALF)
    assert is_timeout_answer(await read_to_end(reader))


async def sends_blank_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert await received_while_sending(reader, writer, b"\r\n") == b""


async def sends_a_header_by_bytes(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(HALF)
    assert is_timeout_answer(await received_while_sending(reader, writer, b"x"))


async def sends_half_a_second_header(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(GET + HALF)
    assert await read_answer(reader) == b"0"
    assert is_timeout_answer(await received_while_sending(reader, writer, b"x"))


async def sends_half_a_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(100) + b"x")
    assert is_timeout_answer(await read_to_end(reader))


async def sends_a_body_by_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(1_000_000))
    assert is_timeout_answer(await received_while_sending(reader, writer, b"x"))


async def sends_a_body_by_chunks(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    # The extension of a chunk is not part of the body, and is no progress.
    assert is_timeout_answer(
        await received_while_sending(reader, writer, b"1;" + b"x" * 100 + b"\r\ny\r\n")
    )


async def sends_half_a_second_body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(head(1) + b"x" + head(2) + b"x")
    assert await read_answer(reader) == b"1"
    assert is_timeout_answer(await read_to_end(reader))


async def received_while_sending(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, piece: bytes
) -> bytes:
    """All that the server sends while the client sends a piece again and again."""

    async def send_pieces() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.02)

    sending = asyncio.create_task(send_pieces())
    try:
        return await read_to_end(reader)
    finally:
        sending.cancel()


@pytest.mark.parametrize(
    "client",
    [
        sends_nothing,
        sends_half_a_header,
        sends_blank_lines,
        sends_a_header_by_bytes,
        sends_half_a_second_header,
        sends_half_a_body,
        sends_a_body_by_bytes,
        sends_a_body_by_chunks,
        sends_half_a_second_body,
    ],
    ids=lambda client: client.__name__,
)
def test_a_client_that_sends_no_request_is_disconnected(
    client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    async def work() -> None:
        async with connected(echo) as streams:
            await client(*streams)

    run_on_uvloop(work())


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_does_not_read_is_disconnected(connection: str, is_streamed: bool) -> None:
    ended = asyncio.Event()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not is_streamed:
                await send_answer(send, LARGE)
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(len(LARGE) // 65536):
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        finally:
            ended.set()

    async def work() -> None:
        async with serving(large) as address:
            with requesting_client(address, head(0, connection)) as client:
                await ended.wait()
                loop = asyncio.get_running_loop()
                await asyncio.sleep(3 * TIMEOUT_S)
                received = 0
                with contextlib.suppress(ConnectionError):
                    while piece := await loop.sock_recv(client, 1 << 20):
                        received += len(piece)
                assert received < len(LARGE)

    run_on_uvloop(work())


@contextlib.contextmanager
def requesting_client(address: tuple[str, int], request: bytes) -> Iterator[socket.socket]:
    """The socket of a client that has sent a request and reads only what the test reads."""
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
        await send_answer(send, LARGE)

    async def sends(address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head(10 * pieces))
        for _ in range(pieces):
            writer.write(bytes(10))
            await asyncio.sleep(0.05)
        assert await read_answer(reader) == b"%d" % (10 * pieces)
        writer.close()

    async def reads(address: tuple[str, int]) -> None:
        loop, received = asyncio.get_running_loop(), 0
        with requesting_client(address, head(0, "close")) as client:
            for _ in range(pieces):
                received += len(await loop.sock_recv(client, 65536))
                await asyncio.sleep(0.05)
            while piece := await loop.sock_recv(client, 1 << 20):
                received += len(piece)
        assert received > len(LARGE)

    async def work() -> None:
        async with serving(echo) as first, serving(slow_answer) as second:
            await asyncio.gather(sends(first), reads(second))

    run_on_uvloop(work())


async def waits_for_its_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GET)


async def body_is_not_read_yet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(1_000_000))
    writer.write(bytes(1_000_000))


async def expects_100_continue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head(3).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
    writer.write(b"abc")


async def sends_half_of_the_next_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(GET + HALF)


@pytest.mark.parametrize(
    "client",
    [
        waits_for_its_answer,
        body_is_not_read_yet,
        expects_100_continue,
        sends_half_of_the_next_request,
    ],
    ids=lambda client: client.__name__,
)
def test_a_client_that_waits_for_the_server_stays_connected(
    client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(4 * TIMEOUT_S)
        await echo(scope, receive, send)

    async def work() -> None:
        async with connected(late) as (reader, writer):
            await client(reader, writer)
            assert int(await read_answer(reader)) in (0, 3, 1_000_000)

    run_on_uvloop(work())


def test_half_of_the_descriptors_are_for_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in (
        (1, 1), (2, 1), (1024, 512), (20_000, 10_000), (1 << 20, 16_384), (resource.RLIM_INFINITY, 16_384)
    ):  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert connections.max_connections() == expected


def test_the_kernel_probes_idle_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        configure_listener(listener)
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                for level, option in (
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                ):
                    assert accepted.getsockopt(level, option)
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
