"""How many bytes of config may wait, of all APIs together. Decided in the commit of the submit; called by
`Submissions`.

To add up what waits takes long where very many wait. So what it came to is known until so much was submitted
since that it may be over: of what began to run meanwhile nothing need be known.
"""

from __future__ import annotations

import time

from sqlalchemy import Connection, func, select, text

from cortex.errors import OverWaitingBytes
from cortex.store.prepared import Prepared
from cortex.store.schema import IS_WAITING, jobs

_WAITING_BYTES = Prepared(select(func.coalesce(func.sum(jobs.c.config_bytes), 0)).where(IS_WAITING))
_ADDING_UP = 0x636F_7275  # any number that nobody else takes
_IN_TURN = text("SELECT pg_advisory_xact_lock(:key)")
# Other operators submit meanwhile: an operator of several adds up before each config that is longer than this,
# and after so large a part of what may wait.
_SMALL = 64 * 1024
_PART = 16


# What was found to be full is looked at again after a time in which all else can be stored: adding up takes the
# writer's time, and whoever is refused may ask again at once.
_PAUSE = 10
_LONGEST_PAUSE_S = 1.0


class WaitingBytes:
    """What is left of it, as it is known."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._left = 0
        """What may be taken without adding up."""
        self._free = 0
        """When a submit was refused last."""
        self._full_until = 0.0

    def take(self, connection: Connection, size: int) -> None:
        """Let a job wait with a config of this size.

        Raises:
            OverWaitingBytes: too much waits.
        """
        if self._most is None:
            return
        is_shared = connection.dialect.name != "sqlite"
        if size > self._left or (is_shared and size > _SMALL):
            free = self._look(connection, self._most, size, is_shared=is_shared)
            self._left = min(free, size + self._most // _PART) if is_shared else free
        self._left -= size

    def look_again(self) -> None:
        """A job waits again that had begun."""
        self._left = 0

    def _look(self, connection: Connection, most: int, size: int, *, is_shared: bool) -> int:
        begin = time.monotonic()
        if begin < self._full_until and size > self._free:
            raise _over(most, self._free, size)
        if is_shared:
            connection.execute(_IN_TURN, {"key": _ADDING_UP})
        row = _WAITING_BYTES.first(connection, {})
        free = most - (0 if row is None else int(row[0]))
        if size > free:
            now = time.monotonic()
            self._free = free
            self._full_until = now + min(_LONGEST_PAUSE_S, _PAUSE * (now - begin))
            raise _over(most, free, size)
        return free


def _over(most: int, free: int, size: int) -> OverWaitingBytes:
    return OverWaitingBytes(
        f"jobs with {most - free} bytes of config wait, and one with {size} more would be over {most} "
        "(`cortex serve --max-waiting-bytes`); submit again when some have started"
    )
