"""The connections of one operator: as many as leave its engine the descriptors that it needs, none that keeps
others out, and none that holds on although nothing moves. `protocol` tells of each what it does.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections import OrderedDict
from typing import Protocol

import structlog

log = structlog.get_logger()

HEADER_S = 30.0
"""Within which the header of a request has to be there: after the connection, or the last answer."""
_LOOK_S = 5.0
_MOST = 16_384
_TELL_S = 60.0


class Connection(Protocol):
    """One of them."""

    def look(self, now: float) -> None:
        """Called again and again while a request is in progress: give up one that does not come on."""

    def no_header(self) -> None:
        """Close: the header of a request has not come in time."""

    def drop(self) -> None:
        """Close at once."""

    def is_read_out(self) -> bool:
        """Whether the system has taken all that was answered."""


def most() -> int:
    """How many may be open: half of the descriptors. A running job takes two, and who waits for it one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(1, min(limit // 2, _MOST))


class Connections:
    """All of it happens on the event loop. What is done for each request is a change of two dicts: times are
    looked at for all together, every few seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0
        # Without a request in progress, with the time since; and with one. Those of longest ago come first.
        self._idle: OrderedDict[Connection, float] = OrderedDict()
        self._busy: OrderedDict[Connection, None] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._told: float | None = None

    def can_take(self) -> bool:
        """Whether another one may be accepted now: those that were closed for others are gone soon."""
        return self._open < self._most + max(1, self._most // 8)

    def taken(self) -> None:
        """One was accepted."""
        self._open += 1

    def failed(self) -> None:
        """One that was accepted could not be opened."""
        self._open -= 1

    def opened(self, connection: Connection) -> None:
        """One that was accepted can be read; another one is closed if that is too many."""
        if len(self._idle) + len(self._busy) >= self._most:
            self.make_room()
        self._idle[connection] = time.monotonic()
        if self._timer is None:
            self._look_later()

    def begins(self, connection: Connection) -> None:
        """The header of a request is there."""
        if self._idle.pop(connection, None) is not None:
            self._busy[connection] = None

    def rests(self, connection: Connection) -> None:
        """Its requests are answered."""
        if connection in self._busy:
            del self._busy[connection]
            self._idle[connection] = time.monotonic()

    def closed(self, connection: Connection) -> None:
        """It is gone."""
        self._open -= 1
        self._idle.pop(connection, None)
        self._busy.pop(connection, None)

    def make_room(self) -> None:
        """Close the one that has been idle for longest; if none is, the one with the oldest request: most
        likely somebody who waits or follows, and whose client asks again."""
        while self._idle:
            connection, _ = self._idle.popitem(last=False)
            if connection.is_read_out():
                break
            self._busy[connection] = None
        else:
            if not self._busy:
                return
            connection, _ = self._busy.popitem(last=False)
        connection.drop()
        now = time.monotonic()
        if self._told is None or now - self._told > _TELL_S:
            self._told = now
            log.warning(
                "connection limit reached; closing the oldest",
                most=self._most,
                with_a_request=len(self._busy),
            )

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        for connection in list(self._busy):
            connection.look(now)
        while self._idle:
            connection, since = next(iter(self._idle.items()))
            if now - since < HEADER_S:
                break
            del self._idle[connection]
            if connection.is_read_out():
                connection.no_header()
            else:
                self._busy[connection] = None
        self._timer = None
        if self._idle or self._busy:
            self._look_later()
