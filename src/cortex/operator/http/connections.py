"""The connections of one operator: their number is limited, and stalled ones are closed.

The limit leaves descriptors for the engine. At the limit, the oldest idle connection is closed for
a new one. `wire` reports what each connection does.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections import OrderedDict
from typing import Protocol

import structlog

log = structlog.get_logger()

HEADER_TIMEOUT_S = 30.0
"""For the header of a request, from the connection's start or the end of the previous answer."""
CHECK_INTERVAL_S = 5.0
_MAX_CONNECTIONS = 16_384
_WARNING_INTERVAL_S = 60.0


class Connection(Protocol):
    """A connection, as `Connections` uses it."""

    def check_progress(self, now: float) -> None:
        """Close the connection if its request or answer has stalled.

        Called every few seconds while a request is in progress.
        """

    def header_timed_out(self) -> None:
        """Close the connection: the header of a request did not arrive in time."""

    def abort(self) -> None:
        """Close the connection at once."""

    def is_flushed(self) -> bool:
        """Whether the kernel has taken all answers."""


def max_connections() -> int:
    """How many connections may be open: half of the descriptors.

    A running job takes two descriptors, and a client that waits for it one.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return max(1, min(limit // 2, _MAX_CONNECTIONS))


class Connections:
    """All connections of an operator. All methods are called on the event loop.

    A request costs changes of two dicts only: every few seconds, one check covers the times of all.
    """

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._open = 0
        # Connections without a request in progress, since when, and those with one; the oldest
        # first.
        self._idle: OrderedDict[Connection, float] = OrderedDict()
        self._busy: OrderedDict[Connection, None] = OrderedDict()
        self._check_timer: asyncio.TimerHandle | None = None
        self._warned_at: float | None = None

    def can_accept(self) -> bool:
        """Whether another connection may be accepted now.

        A few above the limit may: the connections closed in their favour are about to disappear.
        """
        return self._open < self._max_open + max(1, self._max_open // 8)

    def accepted(self) -> None:
        """Count a connection that was accepted."""
        self._open += 1

    def failed(self) -> None:
        """Discount an accepted connection that could not be opened."""
        self._open -= 1

    def opened(self, connection: Connection) -> None:
        """Add an accepted connection that can be read now. At the limit, close another one."""
        if len(self._idle) + len(self._busy) >= self._max_open:
            self.make_room()
        self._idle[connection] = time.monotonic()
        if self._check_timer is None:
            self._schedule_check()

    def request_started(self, connection: Connection) -> None:
        """The header of a request is complete."""
        if self._idle.pop(connection, None) is not None:
            self._busy[connection] = None

    def request_finished(self, connection: Connection) -> None:
        """All requests of the connection are answered."""
        if connection in self._busy:
            del self._busy[connection]
            self._idle[connection] = time.monotonic()

    def closed(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self._open -= 1
        self._idle.pop(connection, None)
        self._busy.pop(connection, None)

    def make_room(self) -> None:
        """Close the connection that has been idle for longest.

        If none is idle, close the one with the oldest request: most likely a long poll or a
        followed log, whose client retries.
        """
        while self._idle:
            connection, _ = self._idle.popitem(last=False)
            if connection.is_flushed():
                break
            self._busy[connection] = None
        else:
            if not self._busy:
                return
            connection, _ = self._busy.popitem(last=False)
        connection.abort()
        now = time.monotonic()
        if self._warned_at is None or now - self._warned_at > _WARNING_INTERVAL_S:
            self._warned_at = now
            log.warning(
                "connection limit reached; closing the oldest",
                limit=self._max_open,
                with_request=len(self._busy),
            )

    def _schedule_check(self) -> None:
        self._check_timer = asyncio.get_running_loop().call_later(CHECK_INTERVAL_S, self._check)

    def _check(self) -> None:
        now = time.monotonic()
        for connection in list(self._busy):
            connection.check_progress(now)
        while self._idle:
            connection, since = next(iter(self._idle.items()))
            if now - since < HEADER_TIMEOUT_S:
                break
            del self._idle[connection]
            if connection.is_flushed():
                connection.header_timed_out()
            else:
                self._busy[connection] = None
        self._check_timer = None
        if self._idle or self._busy:
            self._schedule_check()
