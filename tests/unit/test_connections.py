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

from cortex.operator import connections, protocol
from cortex.operator.http import Receive, Scope, Send
from cortex.operator.server import prepare
from unit.test_protocol import connected, head, serving

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
SOON_S = 0.4
LARGE = bytes(24 * 1024**2)  # more than the system takes for a client that does not read


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it happens at once."""
    monkeypatch.setattr(connections, "_LOOK_S", 0.05)
    monkeypatch.setattr(connections, "HEADER_S", SOON_S)
    monkeypatch.setattr(protocol, "BODY_S", SOON_S)
    monkeypatch.setattr(protocol, "ANSWER_S", SOON_S)


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
    monkeypatch.setattr(protocol, "LEAST_BYTES", 10)
    monkeypatch.setattr(protocol, "BODY_S", 3.0)
    monkeypatch.setattr(protocol, "ANSWER_S", 3.0)
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


WAIT = GET.replace(b"/ ", b"/wait ")


class Held:
    """A server on which a request to /wait waits, and its clients."""

    def __init__(self, address: tuple[str, int], asked: asyncio.Semaphore) -> None:
        self.address = address
        self._asked = asked
        self._clients = contextlib.ExitStack()

    def close(self) -> None:
        self._clients.close()

    def opened(self, sent: bytes = b"") -> socket.socket:
        client = self._clients.enter_context(socket.create_connection(self.address))
        client.sendall(sent)
        client.setblocking(False)
        return client

    async def answered(self) -> socket.socket:
        """One that is kept, and idle."""
        client = self.opened()
        assert await is_open(client)
        return client

    async def waiting(self, sent: bytes = WAIT) -> socket.socket:
        client = self.opened(sent)
        await self._asked.acquire()
        return client


def on_held(most: int, work: Callable[[Held], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        asked = asyncio.Semaphore(0)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != "/wait":
                await answered(send, LARGE if scope["path"] == "/large" else b"0")
                return
            asked.release()
            while (await receive())["type"] != "http.disconnect":
                pass

        async with serving(app, most) as address:
            held = Held(address, asked)
            try:
                await work(held)
            finally:
                held.close()

    run(all_of_it())


async def received(client: socket.socket) -> bytes:
    try:
        return await asyncio.get_running_loop().sock_recv(client, 1 << 20)
    except ConnectionError:
        return b""


async def is_closed(client: socket.socket) -> bool:
    return await received(client) == b""


async def is_open(client: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        client.send(GET)
    return (await received(client)).startswith(b"HTTP/1.1 200 ")


def is_left_alone(client: socket.socket) -> bool:
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 600.0)
    monkeypatch.setattr(protocol, "BODY_S", 600.0)
    monkeypatch.setattr(protocol, "ANSWER_S", 600.0)


@pytest.mark.usefixtures("patient")
def test_the_one_that_is_idle_for_longest_makes_room() -> None:
    async def work(held: Held) -> None:
        waits = await held.waiting()
        third = held.opened(HALF)
        first, second = await held.answered(), await held.answered()
        assert await is_open(first)
        for oldest in (third, second, first):
            await held.answered()
            assert await is_closed(oldest)
        assert is_left_alone(waits)

    on_held(4, work)


@pytest.mark.usefixtures("patient")
def test_if_none_is_idle_the_oldest_request_makes_room() -> None:
    async def work(held: Held) -> None:
        half_a_body = head(100).replace(b"/ ", b"/wait ", 1) + b"x"
        clients = [await held.waiting(half_a_body)]
        clients += [await held.waiting() for _ in range(11)]
        for client in clients[:8]:
            assert await is_closed(client)
        assert all(map(is_left_alone, clients[8:]))
        await held.answered()

    on_held(4, work)


@pytest.mark.usefixtures("patient")
def test_one_that_still_reads_its_answer_is_not_idle() -> None:
    async def work(held: Held) -> None:
        reads = held.opened(
            GET.replace(b"/ ", b"/large ").replace(b"Host", b"Connection: close\r\nHost")
        )
        got = len(await received(reads))
        for _ in range(3):
            await held.answered()
        while piece := await received(reads):
            got += len(piece)
        assert got > len(LARGE)

    on_held(2, work)


@pytest.mark.usefixtures("patient")
def test_more_than_may_be_are_never_open() -> None:
    async def work(held: Held) -> None:
        many = [held.opened(HALF) for _ in range(100)]
        assert await is_open(await held.answered())
        for client in many[:-5]:
            assert await is_closed(client)

    on_held(5, work)


@pytest.mark.usefixtures("patient")
def test_where_there_is_no_descriptor_one_is_made_free() -> None:
    """As where an operator's jobs take them all."""

    async def work(held: Held) -> None:
        idle = await held.answered()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as late:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                late.connect(held.address)
                assert await is_closed(idle)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            late.setblocking(False)
            assert await is_open(late)

    on_held(5, work)


def test_half_of_the_descriptors_are_for_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in (
        (1, 1), (2, 1), (1024, 512), (20_000, 10_000), (1 << 20, 16_384), (resource.RLIM_INFINITY, 16_384)
    ):  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert connections.most() == most


def test_connections_are_asked_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        prepare(listener)
        with socket.create_connection(listener.getsockname()):
            taken, _ = listener.accept()
            with taken:
                for level, option in (
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                ):
                    assert taken.getsockopt(level, option)
                assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
