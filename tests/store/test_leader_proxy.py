"""PostgreSQL only: a request is forwarded to the leader, even if the leader changed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.requests import Request

from chaos.postgresql_proxy import postgresql_proxy
from cortex.errors import StorageUnavailable
from cortex.operator.ha.forwarding import LeaderProxy
from cortex.store import Store
from postgresql_server import PostgreSQLServer
from store.recorded_leader import RecordedLeader, eventually

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
INFO = {"type": "http", "method": "GET", "path": "/-/info", "query_string": b"", "headers": []}


class Pair:
    """Two operators on a database, and the proxy of the first, which led at its last query."""

    def __init__(self, first: Store, second: Store, address: str) -> None:
        self.first, self.second, self.address = first, second, address
        self.proxy = LeaderProxy(first)

    async def change_leader(self) -> None:
        """Make the second operator the leader."""
        await self.first.operators.leave()
        self.second.operators.join("here", "this machine", self.address)
        second = RecordedLeader()
        await self.second.operators.join_election(second, 30)
        await eventually(lambda: second.is_leader)  # the first operator's session may end late

    async def is_forwarded(self) -> bool:
        """Whether the proxy forwards a request to the second operator."""
        return await self.proxy.forward(Request(INFO)) is not None

    async def await_forwarding(self) -> None:
        """Wait until the proxy has found the second operator; it queries only after a change."""
        async with asyncio.timeout(60):
            while not await self.is_forwarded():  # noqa: ASYNC110  # the proxy does not notify
                await asyncio.sleep(0.05)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER)
    await writer.drain()
    writer.close()


@asynccontextmanager
async def pair(first_url: str, second_url: str) -> AsyncIterator[Pair]:
    first, second = Store(first_url), Store(second_url)
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    made = Pair(first, second, f"http://{host}:{port}")
    try:
        first.operators.join("here", "this machine", "http://operator.invalid")
        await first.operators.join_election(RecordedLeader(), 30)
        assert not await made.is_forwarded()
        yield made
    finally:
        await made.proxy.close()
        server.close()
        for store in (first, second):
            await store.operators.leave()
            store.close()


def test_a_new_leader_is_found_after_a_lost_connection(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def work(folder: Path) -> None:
        async with pair(f"{database.partition('?')[0]}?host={folder}", database) as both:
            await both.change_leader()
            gate.shut()
            both.proxy.leader_changed()
            with pytest.raises(StorageUnavailable):
                await both.first.operators.leader()
            await asyncio.sleep(0.1)
            gate.open()
            await both.await_forwarding()

    with postgresql_proxy(postgresql.folder) as gate:
        asyncio.run(work(gate.folder))


def test_a_change_of_the_leader_during_a_query_is_not_missed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with pair(database, database) as both:
            query, changed = both.first.operators.leader, asyncio.Event()

            async def query_slowly() -> str | None:
                found = await query()
                await changed.wait()
                return found

            monkeypatch.setattr(both.first.operators, "leader", query_slowly)
            both.proxy.leader_changed()
            await asyncio.sleep(0.2)
            await both.change_leader()
            both.proxy.leader_changed()
            changed.set()
            await both.await_forwarding()

    asyncio.run(work())
