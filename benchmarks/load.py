"""A client that costs little, so that it measures the server: HTTP/1.1 over a kept-alive socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit


class Connection:
    """One kept-alive connection; one request at a time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host

    @classmethod
    async def open(cls, url: str) -> Connection:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        return cls(reader, writer, parts.netloc)

    async def text(self, method: str, path: str, body: bytes = b"") -> str:
        """The answer's body; anything but 200 fails."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        answer = (await self._reader.readexactly(length)).decode()
        assert head.startswith("http/1.1 200"), answer
        return answer

    async def request(self, method: str, path: str, body: bytes = b"") -> Any:
        """The answer's JSON."""
        return json.loads(await self.text(method, path, body))

    def close(self) -> None:
        self._writer.close()


async def parallel(
    url: str, method: str, path: str, body: bytes, number: int, connections: int
) -> list[Any]:
    """The same request many times over several connections; all answers."""

    async def client(share: int) -> list[Any]:
        connection = await Connection.open(url)
        answers = [await connection.request(method, path, body) for _ in range(share)]
        connection.close()
        return answers

    shares = [number // connections + (n < number % connections) for n in range(connections)]
    return [answer for part in await asyncio.gather(*map(client, shares)) for answer in part]
