"""The limit on the bytes of config of all waiting jobs together, checked in the commit of a submit.

Called by `Submissions`. Adding up the configs takes long if very many jobs wait. Therefore the sum
is computed only when the submits since the last time may have reached the limit. Jobs that started
meanwhile only lower the sum, so they need not be counted.
"""

from __future__ import annotations

import time

from sqlalchemy import Connection, func, select, text

from cortex.errors import OverWaitingBytes
from cortex.store.lock_keys import WAITING_BYTES_LOCK
from cortex.store.prepared import Prepared
from cortex.store.schema import IS_WAITING, jobs

_WAITING_BYTES = Prepared(select(func.coalesce(func.sum(jobs.c.config_bytes), 0)).where(IS_WAITING))
_LOCK = text("SELECT pg_advisory_xact_lock(:key)")
# Other operators on the database submit meanwhile. Therefore an operator adds up before each config
# longer than `_LARGE_CONFIG`, and after it has accepted one `_BUDGET_PART`th of the limit.
_LARGE_CONFIG = 64 * 1024
_BUDGET_PART = 16
# When the limit is reached, the sum is reused for `_PAUSE_FACTOR` times as long as adding up took:
# adding up takes the writer's time, and refused clients may retry at once.
_PAUSE_FACTOR = 10
_MAX_PAUSE_S = 1.0


class WaitingBytes:
    """How many bytes are left, as far as known. Used by the thread that writes alone."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._budget = 0
        """Bytes that may be accepted without adding up again."""
        self._free = 0
        """Bytes that were free when a submit was last refused."""
        self._full_until = 0.0

    def add(self, connection: Connection, size: int) -> None:
        """Count the config of one more waiting job.

        Raises:
            OverWaitingBytes: the waiting configs would be over the limit.
        """
        is_shared = connection.dialect.name != "sqlite"
        if self._limit is None or self.add_within_budget(size, is_shared=is_shared):
            return
        free = self._add_up(connection, self._limit, size, is_shared=is_shared)
        self._budget = min(free, size + self._limit // _BUDGET_PART) if is_shared else free
        self._budget -= size

    def add_within_budget(self, size: int, *, is_shared: bool) -> bool:
        """Count the config of one more waiting job, if that needs no adding up; whether it was."""
        if self._limit is None:
            return True
        if size > self._budget or (is_shared and size > _LARGE_CONFIG):
            return False
        self._budget -= size
        return True

    def on_waiting_again(self) -> None:
        """A job that had left the queue waits again: add up at the next submit."""
        self._budget = 0

    def _add_up(self, connection: Connection, limit: int, size: int, *, is_shared: bool) -> int:
        begin = time.monotonic()
        if begin < self._full_until and size > self._free:
            raise _over_limit(limit, self._free, size)
        if is_shared:
            connection.execute(_LOCK, {"key": WAITING_BYTES_LOCK})
        row = _WAITING_BYTES.first(connection, {})
        free = limit - (0 if row is None else int(row[0]))
        if size > free:
            now = time.monotonic()
            self._free = free
            self._full_until = now + min(_MAX_PAUSE_S, _PAUSE_FACTOR * (now - begin))
            raise _over_limit(limit, free, size)
        return free


def _over_limit(limit: int, free: int, size: int) -> OverWaitingBytes:
    return OverWaitingBytes(
        f"waiting jobs have {limit - free} bytes of config, and {size} more would exceed {limit} "
        "(`cortex serve --max-waiting-bytes`); retry after some of them have started"
    )
