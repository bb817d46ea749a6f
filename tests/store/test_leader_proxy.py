"""Requests that only the leader can answer are forwarded to it, also where it was hard to find out who it is."""

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
    """Two operators on a database, of which one drives, and the relay of one that does not drive any
    more: it drove when it looked last."""

    def __init__(self, first: Store, second: Store, address: str) -> None:
        self.first, self.second, self.address = first, second, address
        self.relay = LeaderProxy(first)

    async def change(self) -> None:
        """Let the second one drive in place of the first."""
        await self.first.operators.leave()
        self.second.operators.join("here", "this machine", self.address)
        second = RecordedLeader()
        await self.second.operators.join_election(second, 30)
        await eventually(lambda: second.drives)  # the session of the first may end late

    async def is_asked(self) -> bool:
        """Whether the second one is."""
        return await self.relay.forward(Request(INFO)) is not None


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER)
    await writer.drain()
    writer.close()


@asynccontextmanager
async def pair(first_url: str, second_url: str) -> AsyncIterator[Pair]:
    first, second = Store(first_url), Store(second_url)
    server = await asyncio.start_server(answers, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    made = Pair(first, second, f"http://{host}:{port}")
    try:
        first.operators.join("here", "this machine", "http://operator.invalid")
        await first.operators.join_election(RecordedLeader(), 30)
        assert not await made.is_asked()
        yield made
    finally:
        await made.relay.close()
        server.close()
        for store in (first, second):
            await store.operators.leave()
            store.close()


def test_a_change_that_could_not_be_looked_at_is_looked_at_later(
    postgresql: PostgreSQLServer, database: str
) -> None:
    async def work(folder: Path) -> None:
        async with pair(f"{database.partition('?')[0]}?host={folder}", database) as both:
            await both.change()
            between.shut()
            both.relay.leader_changed()
            with pytest.raises(StorageUnavailable):
                await both.first.operators.leader()
            await asyncio.sleep(0.1)
            between.open()
            async with asyncio.timeout(60):
                while not await both.is_asked():  # noqa: ASYNC110  # nobody tells of it
                    await asyncio.sleep(0.05)

    with postgresql_proxy(postgresql.folder) as between:
        asyncio.run(work(between.folder))


def test_a_change_while_another_one_is_looked_at_is_not_missed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with pair(database, database) as both:
            leader, changed = both.first.operators.leader, asyncio.Event()

            async def slowly() -> str | None:
                found = await leader()
                await changed.wait()
                return found

            monkeypatch.setattr(both.first.operators, "leader", slowly)
            both.relay.leader_changed()
            looking = both.relay._refreshing
            await asyncio.sleep(0.2)
            await both.change()
            both.relay.leader_changed()
            changed.set()
            assert looking is not None
            await looking
            assert await both.is_asked()

    asyncio.run(work())
