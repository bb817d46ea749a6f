"""Following a job's log: Server-Sent Events, taken up again where they broke off."""

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

# An operator that restarts is back within these; their sum is how long one may be away.
PAUSES_S = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)


@dataclass(frozen=True)
class Event:
    """One event; a comment, which keeps the connection alive, is an event named `:`."""

    name: str
    id: str
    data: str


def follow(connect: Connect, *, pause: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The log's text from its beginning, as it is written, until the job has ended.

    `connect` opens the stream after a given event. Until it has worked once, its failure is final;
    from then on the stream is resumed after the last event that arrived.
    """
    log = _Followed()
    while True:
        try:
            with connect(log.last_id) as chunks:
                log.begin()
                for chunk in chunks:
                    yield from log.read(chunk)
                    if log.has_ended:
                        return
            broken = None
        except CortexError as error:
            broken = error
        pause(log.pause_s(broken))


async def follow_async(
    connect: AsyncConnect, *, pause: Callable[[float], Awaitable[None]]
) -> AsyncGenerator[str, None]:
    """As `follow`, with asyncio's way to pause, which nobody else is to load."""
    log = _Followed()
    while True:
        try:
            async with connect(log.last_id) as chunks:
                log.begin()
                async for chunk in chunks:
                    for text in log.read(chunk):
                        yield text
                    if log.has_ended:
                        return
            broken = None
        except CortexError as error:
            broken = error
        await pause(log.pause_s(broken))


class Parser:
    """The events in a stream of bytes. One that the stream breaks off within is dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._name, self._id, self._data = "message", "", list[str]()

    def events(self, chunk: bytes) -> Iterator[Event]:
        """Those that these bytes complete."""
        # Not `str.splitlines`: it would split data at U+2028 and its like, which end no line here.
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            event = self._event(line.removesuffix(b"\r").decode("utf-8", "replace"))
            if event is not None:
                yield event

    def _event(self, line: str) -> Event | None:
        if not line:
            whole = Event(self._name, self._id, "\n".join(self._data)) if self._data else None
            self._name, self._data = "message", []
            return whole
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


class _Followed:
    """How far a log was read, and for how long its stream is sought again."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self.has_ended = False
        self._parser = Parser()
        self._has_begun = False
        self._pauses: Iterator[float] = iter(())

    def begin(self) -> None:
        """A stream begins, after `last_id`."""
        if not self._has_begun:
            self._has_begun, self._pauses = True, iter(PAUSES_S)
        self._parser = Parser()

    def read(self, chunk: bytes) -> Iterator[str]:
        """The text in these bytes of the stream."""
        for event in self._parser.events(chunk):
            self._pauses = iter(PAUSES_S)
            if event.name == "end":
                self.has_ended = True
                return
            if event.name == "log":
                self.last_id = event.id
                yield json.loads(event.data)

    def pause_s(self, broken: CortexError | None) -> float:
        """The time until the stream is sought again, after it ended or an error broke it.

        Raises:
            CortexError: it is not: the error will not pass, or the operator was away for too long.
        """
        if broken is None:
            broken = OperatorUnreachable("the stream of the job's log broke off")
        pause_s = next(self._pauses, None)
        if broken.http_status < 500 or pause_s is None:
            raise broken
        return pause_s
