"""The limit of open connections, and which connection the server closes for a new one."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Receive, Scope, Send

from cortex.operator.http import connections, wire
from http_server.test_connections import GET, HALF, LARGE, run_on_uvloop, send_answer
from http_server.test_protocol import head, serving

WAIT = GET.replace(b"/ ", b"/wait ")


class ServerWithClients:
    """A server that never answers a request to /wait, and its clients."""

    def __init__(self, address: tuple[str, int], arrived: asyncio.Semaphore) -> None:
        self.address = address
        self._arrived = arrived
        self._clients = contextlib.ExitStack()

    def close(self) -> None:
        self._clients.close()

    def new_client(self, sent: bytes = b"") -> socket.socket:
        client = self._clients.enter_context(socket.create_connection(self.address))
        client.sendall(sent)
        client.setblocking(False)
        return client

    async def idle_client(self) -> socket.socket:
        """A client that has its answer, and keeps its idle connection."""
        client = self.new_client()
        assert await is_open(client)
        return client

    async def waiting_client(self, sent: bytes = WAIT) -> socket.socket:
        client = self.new_client(sent)
        await self._arrived.acquire()
        return client


def with_server(max_connections: int, work: Callable[[ServerWithClients], Awaitable[None]]) -> None:
    async def serve_and_work() -> None:
        arrived = asyncio.Semaphore(0)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != "/wait":
                await send_answer(send, LARGE if scope["path"] == "/large" else b"0")
                return
            arrived.release()
            while (await receive())["type"] != "http.disconnect":
                pass

        async with serving(app, max_connections) as address:
            server = ServerWithClients(address, arrived)
            try:
                await work(server)
            finally:
                server.close()

    run_on_uvloop(serve_and_work())


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


def is_undisturbed(client: socket.socket) -> bool:
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True


@pytest.fixture(autouse=True)
def long_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timeout passes within the test: the limit alone closes connections."""
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 600.0)
    monkeypatch.setattr(wire, "BODY_TIMEOUT_S", 600.0)
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT_S", 600.0)


def test_the_connection_that_is_idle_for_longest_is_closed_first() -> None:
    async def work(server: ServerWithClients) -> None:
        waits = await server.waiting_client()
        third = server.new_client(HALF)
        first, second = await server.idle_client(), await server.idle_client()
        assert await is_open(first)
        for oldest in (third, second, first):
            await server.idle_client()
            assert await is_closed(oldest)
        assert is_undisturbed(waits)

    with_server(4, work)


def test_if_no_connection_is_idle_that_of_the_oldest_request_is_closed() -> None:
    async def work(server: ServerWithClients) -> None:
        half_a_body = head(100).replace(b"/ ", b"/wait ", 1) + b"x"
        clients = [await server.waiting_client(half_a_body)]
        clients += [await server.waiting_client() for _ in range(11)]
        for client in clients[:8]:
            assert await is_closed(client)
        assert all(map(is_undisturbed, clients[8:]))
        await server.idle_client()

    with_server(4, work)


def test_a_client_that_still_reads_its_answer_is_not_idle() -> None:
    async def work(server: ServerWithClients) -> None:
        reads = server.new_client(
            GET.replace(b"/ ", b"/large ").replace(b"Host", b"Connection: close\r\nHost")
        )
        got = len(await received(reads))
        for _ in range(3):
            await server.idle_client()
        while piece := await received(reads):
            got += len(piece)
        assert got > len(LARGE)

    with_server(2, work)


def test_no_more_connections_than_the_limit_are_open() -> None:
    async def work(server: ServerWithClients) -> None:
        many = [server.new_client(HALF) for _ in range(100)]
        assert await is_open(await server.idle_client())
        for client in many[:-5]:
            assert await is_closed(client)

    with_server(5, work)


def test_an_idle_connection_is_closed_where_descriptors_run_out() -> None:
    """An operator's jobs can take all descriptors."""

    async def work(server: ServerWithClients) -> None:
        idle = await server.idle_client()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as late:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                late.connect(server.address)
                assert await is_closed(idle)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            late.setblocking(False)
            assert await is_open(late)

    with_server(5, work)
