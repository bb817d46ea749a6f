"""Follows a job's log over Server-Sent Events, and reconnects after the last event received."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cortex.errors import CortexError, OperatorUnreachable

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterable,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
    )
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    Connect = Callable[[str | None], AbstractContextManager[Iterable[bytes]]]
    AsyncConnect = Callable[[str | None], AbstractAsyncContextManager[AsyncIterable[bytes]]]

# Long enough for an operator's restart. The sum is the longest outage that a stream survives.
RECONNECT_DELAYS_S = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)


@dataclass(frozen=True)
class Event:
    """One event. A comment, which keeps the connection alive, is an event named `:`."""

    name: str
    id: str
    data: str


def follow(connect: Connect, *, pause: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The log's text from its beginning, as the job writes it, until the job has ended.

    Args:
        connect: opens the stream after the event of the given id; None is from the beginning.
        pause: waits for a number of seconds.

    Raises:
        CortexError: the first connection failed; or a later one did, with a permanent error or for
            longer than all of `RECONNECT_DELAYS_S`.
    """
    log = _LogCursor()
    while True:
        try:
            with connect(log.last_id) as chunks:
                log.start_stream()
                for chunk in chunks:
                    yield from log.parse(chunk)
                    if log.has_ended:
                        return
            failure = None
        except CortexError as error:
            failure = error
        pause(log.reconnect_delay_s(failure))


async def follow_async(
    connect: AsyncConnect, *, pause: Callable[[float], Awaitable[None]]
) -> AsyncGenerator[str, None]:
    """`follow` for asyncio. The caller passes `pause`: this module must not load asyncio."""
    log = _LogCursor()
    while True:
        try:
            async with connect(log.last_id) as chunks:
                log.start_stream()
                async for chunk in chunks:
                    for text in log.parse(chunk):
                        yield text
                    if log.has_ended:
                        return
            failure = None
        except CortexError as error:
            failure = error
        await pause(log.reconnect_delay_s(failure))


class Parser:
    """The events in a stream of bytes. An event that the end of the stream cuts off is dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._name, self._id, self._data = "message", "", list[str]()

    def events(self, chunk: bytes) -> Iterator[Event]:
        """The events that a chunk of the stream completes."""
        # `str.splitlines` would also split at U+2028 and other characters that may occur in data.
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            event = self._event(line.removesuffix(b"\r").decode("utf-8", "replace"))
            if event is not None:
                yield event

    def _event(self, line: str) -> Event | None:
        if not line:
            event = Event(self._name, self._id, "\n".join(self._data)) if self._data else None
            self._name, self._data = "message", []
            return event
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "":
            return Event(":", self._id, value)
        if field == "event":
            self._name = value
        elif field == "id":
            self._id = value
        elif field == "data":
            self._data.append(value)
        return None


class _LogCursor:
    """The position in a log that is followed, and the delays left until its stream is given up."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self.has_ended = False
        self._parser = Parser()
        self._was_connected = False
        self._delays: Iterator[float] = iter(())

    def start_stream(self) -> None:
        """Note a new connection, whose stream begins after `last_id`."""
        if not self._was_connected:
            self._was_connected, self._delays = True, iter(RECONNECT_DELAYS_S)
        self._parser = Parser()

    def parse(self, chunk: bytes) -> Iterator[str]:
        """The log's text in a chunk of the stream."""
        for event in self._parser.events(chunk):
            self._delays = iter(RECONNECT_DELAYS_S)
            if event.name == "end":
                self.has_ended = True
                return
            if event.name == "log":
                self.last_id = event.id
                yield json.loads(event.data)

    def reconnect_delay_s(self, failure: CortexError | None) -> float:
        """The delay before the next connection.

        Args:
            failure: the error that broke the stream; None where the stream ended before the log
                did.

        Raises:
            CortexError: the failure is permanent, or no delay is left.
        """
        if failure is None:
            failure = OperatorUnreachable("the stream of the job's log ended before the job did")
        delay_s = next(self._delays, None)
        if failure.http_status < 500 or delay_s is None:
            raise failure
        return delay_s
