"""As many connections as may be open, and who makes room for one more."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Receive, Scope, Send

from cortex.operator.http import connections, wire
from http_server.test_connections import GET, HALF, LARGE, answered, run
from http_server.test_protocol import head, serving

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


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 600.0)
    monkeypatch.setattr(wire, "BODY_TIMEOUT_S", 600.0)
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT_S", 600.0)


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


def test_more_than_may_be_are_never_open() -> None:
    async def work(held: Held) -> None:
        many = [held.opened(HALF) for _ in range(100)]
        assert await is_open(await held.answered())
        for client in many[:-5]:
            assert await is_closed(client)

    on_held(5, work)


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
